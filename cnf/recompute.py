"""Checkpointing a function that may itself differentiate: only its inputs are kept, the backward pass repeats it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnf.errors import ConfigError

__all__ = ["Recompute", "differentiable_once", "final", "present_autocast"]

State = tuple[Tensor, ...]
KEPT = 4  # states of a chain that are kept for the backward pass; RNODE's four steps are then repeated only once


class Recompute:
    """Calls functions of a state and forgets what they made on the way; the backward pass calls them again.

    torch.utils.checkpoint cannot serve here. Where the function takes a derivative of its own, as Hutchinson's
    estimate does in reverse mode, that inner backward pass meets the checkpoint's hooks in the forward pass already:
    the function is repeated there and then, once a stage, and what the repetitions made is kept (measured: 56
    evaluations instead of 16 in the forward pass of 4 rk4 steps, and more memory than without a checkpoint). The
    price: every tensor that the functions close over and that wants a gradient has to be named.

    Args:
        parameters: those tensors; where one is missing the backward pass says so.
        gradient: what a solver calls this way of having its gradient, for that message.

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
        """function(*state), which must be deterministic; the values can be differentiated once.

        Raises:
            ConfigError: from the backward pass, for a tensor that wants a gradient and is not among the parameters.
        """
        result: State = _Repeated.apply(self, function, len(state), *state, *self.parameters)
        return result

    def chain(self, functions: Sequence[Callable[..., State]], state: State) -> State:
        """One function after another, in memory that does not grow with their number.

        At most :data:`KEPT` states are kept. Where there are more functions the backward pass first repeats a whole
        stretch of them, keeping its states, and then each one again: another forward pass in time.
        """
        each, count = Recompute(self.parameters), min(KEPT, len(functions))
        for i in range(count):
            stretch = functions[i * len(functions) // count : (i + 1) * len(functions) // count]
            state = self(partial(_run, stretch, each), state)
        return state

    def strangers(self, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[weakref.ref[Tensor]]:
        """Leaves that outputs depend on and nobody named; looked for once, since every call closes over the same."""
        if self.checked:
            return []
        self.checked = True
        known = (*inputs, *self.parameters)
        leaves = {id(t) for t in known}
        seen: set[Any] = {t.grad_fn for t in known} | {None}
        todo: list[Any] = [t.grad_fn for t in outputs]
        found = []
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in leaves:
                found.append(weakref.ref(leaf))
            todo.extend(n for n, _ in node.next_functions)
        return found

    def pull(
        self,
        function: Callable[..., State],
        state: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
        autocast: torch.autocast,
    ) -> tuple[State, list[Tensor | None]]:
        """function(*state) once more: its values, and what ``gradients`` of them are in the state and the parameters.

        Args:
            function: as in :meth:`__call__`.
            state: the entries, of which only the values count.
            gradients: one for each value; None where nothing depends on it.
            needed: which gradients are wanted, those of the entries first, then those of the parameters.
            autocast: what the function was under the first time; its derivatives are under none.

        Raises:
            ConfigError: for a tensor that wants a gradient and is not among the parameters.
        """
        with torch.enable_grad(), autocast:
            entries = [t.detach().requires_grad_(n) for t, n in zip(state, needed, strict=False)]
            outputs = function(*entries)
        values = tuple(o.detach() for o in outputs)
        used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        if not used or not any(needed):
            return values, [None] * len(needed)
        strangers = self.strangers((o for o, _ in used), entries)
        wanted = [t for t, n in zip((*entries, *self.parameters), needed, strict=True) if n]
        ends, given = zip(*used, strict=True)
        # retain_graph: what was computed once before the solve and is closed over is met again by the next step
        found = iter(torch.autograd.grad(ends, wanted, given, retain_graph=True, allow_unused=True))
        del outputs, used, ends
        self.refuse(strangers)
        return values, [next(found) if n else None for n in needed]

    def unnamed(self, function: Callable[..., State], state: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate function(*state) once, and return the leaves that want a gradient and are not among the parameters."""
        with torch.enable_grad():
            entries = [t.detach().requires_grad_() for t in state]
            outputs = function(*entries)
        strangers = self.strangers((o for o in outputs if o.requires_grad), entries)
        del outputs
        return [leaf for reference in strangers if (leaf := reference()) is not None]

    def refuse(self, strangers: Iterable[weakref.ref[Tensor]]) -> None:
        """Refuse those that outlive the function's graph: leaves that it made on the way are gone with it."""
        for reference in strangers:
            leaf = reference()
            if leaf is not None:
                raise ConfigError(
                    f"gradient={self.gradient!r}: the right-hand side uses a tensor of shape {tuple(leaf.shape)} that wants "
                    "a gradient but is not among the solver's parameters, so it would get none: name it there, or take "
                    "gradient='direct'"
                )


def _run(functions: Sequence[Callable[..., State]], each: Recompute, *state: Tensor) -> State:
    """A stretch of a chain: plain where nothing is recorded, or where there is nothing to gain."""
    nested = torch.is_grad_enabled() and len(functions) > 1
    for function in functions:
        state = each(function, state) if nested else function(*state)
    return state


def present_autocast(like: Tensor) -> torch.autocast:
    """The autocast that is in force now on the device of ``like``, to be entered again in a backward pass."""
    device = like.device.type
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _refused(gradient: str) -> ConfigError:
    return ConfigError(f"gradient={gradient!r} can be differentiated once, and a second derivative was requested: take gradient='direct'")


class _Final(torch.autograd.Function):
    """The identity on gradients that have no derivative of their own; without it they would count as constants."""

    @staticmethod
    def forward(ctx: Any, gradient: str, anchor: Tensor, *tensors: Tensor) -> State:
        ctx.gradient = gradient
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise _refused(ctx.gradient)


def final(gradient: str, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of a backward pass; where it is recorded, differentiating them raises a ConfigError."""
    if not torch.is_grad_enabled():
        return list(found)
    anchor = torch.zeros((), requires_grad=True)
    marked = iter(_Final.apply(gradient, anchor, *(g for g in found if g is not None)))
    return [None if g is None else next(marked) for g in found]


class _Once(torch.autograd.Function):
    """The identity, whose backward pass may not be recorded."""

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
    """Return the state, whose backward pass refuses to be recorded: for gradients that cannot be marked by :func:`final`."""
    found: State = _Once.apply(gradient, *state)
    return found


class _Repeated(torch.autograd.Function):
    """The function's values without its graph."""

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
            _, found = ctx.owner.pull(ctx.function, state, gradients, ctx.needs_input_grad[3:], ctx.autocast)
        return (None, None, None, *final(ctx.owner.gradient, found))
