"""Activation checkpointing of functions that may themselves differentiate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError

__all__ = ["Recompute", "differentiable_once", "final", "present_autocast"]

State = tuple[Tensor, ...]
KEPT = 4  # states of a sequence stored for the backward pass; RNODE's four steps are then recomputed only once


class Recompute:
    """Activation checkpointing of functions of a state, recomputed in the backward pass.

    torch.utils.checkpoint is unsuitable for functions that take a derivative themselves, as Hutchinson's estimate in
    reverse mode: the inner backward pass triggers the checkpoint's hooks in the forward pass, so that the function is
    recomputed at every stage and the recomputed graph is stored (measured: 56 evaluations instead of 16 in the forward
    pass of 4 rk4 steps, and more memory than without a checkpoint). In exchange, every tensor that the functions close
    over and that requires a gradient must be listed.

    Args:
        parameters: those tensors; the backward pass raises an error if one is missing.
        gradient: the solver's name for this gradient method, for error messages.

    Example:
        >>> w, x = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
        >>> (y,) = Recompute([w])(lambda x: (w * x * x,), (x,))
        >>> torch.autograd.grad(y, w)
        (tensor(9.),)
    """

    def __init__(self, parameters: Iterable[Tensor] = (), gradient: str = "checkpoint"):
        self.gradient = gradient
        self.parameters = tuple({id(p): p for p in parameters if p.requires_grad}.values())
        self.checked = False

    def __call__(self, function: Callable[..., State], state: State) -> State:
        """Return function(*state); the function must be deterministic and its values can be differentiated once.

        Raises:
            ConfigError: from the backward pass, for a tensor that requires a gradient and is not among the parameters.
        """
        return cast(State, _Repeated.apply(self, function, len(state), *state, *self.parameters))

    def checkpoint_sequential(self, functions: Sequence[Callable[..., State]], state: State) -> State:
        """Apply functions one after another in memory independent of their number.

        At most :data:`KEPT` states are stored. With more functions the backward pass first recomputes a whole segment,
        storing its states, and then each function again: one more forward pass in time.
        """
        each, count = Recompute(self.parameters), min(KEPT, len(functions))
        for i in range(count):
            stretch = functions[i * len(functions) // count : (i + 1) * len(functions) // count]
            state = self(partial(_run, stretch, each), state)
        return state

    def untracked_leaves(self, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[weakref.ref[Tensor]]:
        """Return unlisted leaves that outputs depend on; first call only, as all calls share their closure."""
        if self.checked:
            return []
        self.checked = True
        known = (*inputs, *self.parameters)
        leaves = {id(t) for t in known}
        seen: set[Any] = {t.grad_fn for t in known} | {None}
        todo: list[Any] = [t.grad_fn for t in outputs]
        untracked = []
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in leaves:
                untracked.append(weakref.ref(leaf))
            todo.extend(n for n, _ in node.next_functions)
        return untracked

    def vjp(
        self,
        function: Callable[..., State],
        state: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
        autocast: torch.autocast,
    ) -> tuple[State, list[Tensor | None]]:
        """Recompute function(*state); return its values and the vector-Jacobian products for state and parameters.

        ``gradients`` are those of the values, None if nothing depends on one; ``needed`` says for each entry and then
        each parameter whether its gradient is needed; ``autocast`` is the forward pass's, outside of which derivatives run.
        """
        with torch.enable_grad(), autocast:
            entries = [t.detach().requires_grad_(n) for t, n in zip(state, needed, strict=False)]
            outputs = function(*entries)
        values = tuple(o.detach() for o in outputs)
        used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        if not used or not any(needed):
            return values, [None] * len(needed)
        untracked = self.untracked_leaves((o for o, _ in used), entries)
        wanted = [t for t, n in zip((*entries, *self.parameters), needed, strict=True) if n]
        ends, weights = zip(*used, strict=True)
        # retain_graph: the next step uses the graph of what was computed before the solve again
        products = iter(torch.autograd.grad(ends, wanted, weights, retain_graph=True, allow_unused=True))
        del outputs, used, ends
        self.refuse(untracked)
        return values, [next(products) if n else None for n in needed]

    def unnamed(self, function: Callable[..., State], state: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate function(*state) once and return the leaves that require a gradient but are not parameters."""
        with torch.enable_grad():
            entries = [t.detach().requires_grad_() for t in state]
            outputs = function(*entries)
        untracked = self.untracked_leaves((o for o in outputs if o.requires_grad), entries)
        del outputs
        return [leaf for reference in untracked if (leaf := reference()) is not None]

    def refuse(self, untracked: Iterable[weakref.ref[Tensor]]) -> None:
        """Raise a ConfigError for leaves that outlive the function's graph; temporary leaves are freed with it."""
        for reference in untracked:
            leaf = reference()
            if leaf is not None:
                raise ConfigError(
                    f"gradient={self.gradient!r}: the right-hand side uses a tensor of shape {tuple(leaf.shape)} that requires a "
                    "gradient but is not in parameters of solve(): add it there, or use gradient='direct'"
                )


def _run(functions: Sequence[Callable[..., State]], each: Recompute, *state: Tensor) -> State:
    """Run a segment of a sequence; with gradients and several functions each is checkpointed again."""
    nested = torch.is_grad_enabled() and len(functions) > 1
    for function in functions:
        state = each(function, state) if nested else function(*state)
    return state


def present_autocast(like: Tensor) -> torch.autocast:
    """Return the autocast state of the device of ``like``, to be entered again in the backward pass."""
    device = like.device.type
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _refused(gradient: str) -> ConfigError:
    return ConfigError(f"gradient={gradient!r} can be differentiated once, and a second derivative was requested: use gradient='direct'")


class _Final(torch.autograd.Function):
    """Identity on gradients that raises if they are differentiated; autograd would treat them as constants."""

    @staticmethod
    def forward(ctx: Any, gradient: str, anchor: Tensor, *tensors: Tensor) -> State:
        ctx.gradient = gradient
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise _refused(ctx.gradient)


def final(gradient: str, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of a backward pass; differentiating them raises a ConfigError if they are recorded."""
    if not torch.is_grad_enabled():
        return list(gradients)
    anchor = torch.zeros((), requires_grad=True)
    marked = iter(_Final.apply(gradient, anchor, *(g for g in gradients if g is not None)))
    return [None if g is None else next(marked) for g in gradients]


class _Once(torch.autograd.Function):
    """Identity whose backward pass cannot be recorded."""

    @staticmethod
    def forward(ctx: Any, gradient: str, *tensors: Tensor) -> State:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise _refused(ctx.gradient)
        return (None, *gradients)


def differentiable_once(gradient: str, state: State) -> State:
    """Return the state with a backward pass that cannot be recorded, for gradients that :func:`final` cannot mark."""
    return cast(State, _Once.apply(gradient, *state))


class _Repeated(torch.autograd.Function):
    """Values of a function without its graph."""

    @staticmethod
    def forward(ctx: Any, owner: Recompute, function: Callable[..., State], count: int, *tensors: Tensor) -> State:
        ctx.owner, ctx.function, ctx.count, ctx.autocast = owner, function, count, present_autocast(tensors[0])
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return function(*tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        state = ctx.saved_tensors[: ctx.count]
        with torch.no_grad():
            _, products = ctx.owner.vjp(ctx.function, state, gradients, ctx.needs_input_grad[3:], ctx.autocast)
        return (None, None, None, *final(ctx.owner.gradient, products))
