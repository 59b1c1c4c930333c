"""Validation and isolation of custom vector fields, and selection of their optional methods."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from cnf._utils.async_checks import tracing, vectorized
from cnf._utils.errors import ConfigError
from cnf._utils.validation import context_rows
from cnf.fields.autodiff import NORMS, NoForwardMode, Operations, differentiable_attention, reverse_jvp
from cnf.fields.base import SolveField, SolveFunctions, VectorField, consistent, intact
from cnf.fields.findings import Findings, version
from cnf.fields.randomness import SolveRandomness, draws_random_numbers
from cnf.fields.signature import takes_context, wrapped
from cnf.random import Noise

__all__ = ["AnyField", "CustomField", "context_size", "precompute", "protect", "stated"]

AnyField = nn.Module | SolveField | Callable[..., Tensor]
"""``field(t, x, context) -> dx``: a module, a field bound for one solve, or a function."""

_MIXING = 0.02  # relative change of a row's value allowed when its neighbours change (rounding, reduced precision)
_ROWS = 6  # rows of the batch in the comparison
_CALLS = 5  # repeated calls that must agree: a layer skipped at random is detected with probability 0.94
_FOUND = ("random", "whole", "stateful", "reverse", "normalizes")  # attributes that a check finds
_CHECKED: Findings[dict[str, bool]] = Findings()  # by mode
_PRECOMPUTED: Findings[bool] = Findings()


def stated(field: nn.Module, name: str) -> Any:
    """Return an attribute that a field states, or the default of :class:`VectorField`."""
    if name == "interpolant" and not hasattr(field, name) and hasattr(field, "schedule"):
        warnings.warn("a field's `schedule` is called `interpolant`", DeprecationWarning, stacklevel=2)
        name = "schedule"
    return getattr(field, name, getattr(VectorField, name, None))


def _built_in(field: nn.Module) -> bool:
    return type(field).__module__.partition(".")[0] == "cnf" and isinstance(field, VectorField) and not field.custom


def protect(field: AnyField, noise: Noise | None = None) -> SolveField:
    """Return the field in the form that a solver calls: built-in fields as they are, custom ones validated and isolated.

    Args:
        field: an ``nn.Module`` with ``forward(t, x, context=None)`` or ``forward(t, x)``; functions are called unchecked.
        noise: randomness of random layers, drawn once for all calls; torch's global generator if None.

    Raises:
        ConfigError: from a call of the field, if its value is not a floating-point tensor of x's shape.
    """
    if isinstance(field, SolveField):
        return field
    if not isinstance(field, nn.Module):
        return SolveFunctions(field)
    usable = intact(field)
    return _BuiltIn(field, usable) if usable and _built_in(field) else CustomField(field, noise, usable)


def precompute(
    field: AnyField, x: Tensor, context: Tensor | None, noise: Noise | None = None, *, t: Tensor | None = None
) -> SolveField:
    """Return the field for one solve at points like x (N, \\*event), with everything independent of t precomputed.

    Returns ``field.precompute(x, context)`` if its class has a ``precompute`` that agrees with its ``forward`` and the
    field is :func:`intact`, else :func:`protect`'s result. ``t`` is the time at which a custom field is checked, 0.5 if
    None.

    Raises:
        ConfigError: for a field whose value of a row depends on the other rows, such as one with batch statistics.
    """
    now = x.new_full((), 0.5) if t is None else t
    if isinstance(field, VectorField) and consistent(type(field), "precompute") and intact(field):
        made = field.precompute(x, context)
        if made is not None:
            if not _built_in(field):
                _check_precomputed(field, now, x, context)
            return made
    bound = protect(field, noise)
    if isinstance(bound, CustomField):
        _refuse_batch_statistics(bound.module)
        bound.check(now, x, context)
    return bound


def _check_precomputed(field: VectorField, t: Tensor, x: Tensor, context: Tensor | None) -> None:
    """Compare what a custom field's ``precompute`` returns with its ``forward``, when due."""
    if not len(x) or tracing(x) or _PRECOMPUTED.known(field, field.training):
        return
    x, context = x[:_ROWS], context_rows(context, slice(_ROWS))
    with torch.no_grad(), draws_random_numbers(x.device) as drew:
        whole, made = field(t, x.clone(), context), field.precompute(x, context)
        found = whole if made is None else made(t, x.clone(), context)
    apart = float((found - whole).abs().max() / whole.abs().max())
    if apart > _MIXING and not drew[0]:
        raise ConfigError(
            f"field {type(field).__name__} has a precompute that does not match its forward (they differ by {apart:.1%} of its size): correct "
            "it, or leave it out"
        )
    _PRECOMPUTED.keep(field, field.training, True)


class _BuiltIn(SolveFunctions):
    """Module with those of its optional methods that agree with its ``forward``, if ``usable``."""

    def __init__(self, module: nn.Module, usable: bool):
        kind, self.module = type(module), cast(Any, module)
        super().__init__(module, self.module.jvp if usable and consistent(kind, "jvp") else None)
        self.name = kind.__name__
        self.closed_form = usable and consistent(kind, "divergence") and bool(getattr(module, "closed_form", True))

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.closed_form:
            return super().divergence(t, x, context)
        return cast("tuple[Tensor, Tensor]", self.module.divergence(t, x, context))


class CustomField(_BuiltIn):
    """Custom field, isolated for one solve.

    The field receives copies of t, x and context, which it may overwrite. Its random layers draw the same numbers at
    every call. Its value must be a floating-point tensor of x's shape and is copied, since a later call may overwrite
    it. Without ``noise``, random layers draw from torch's global generator, advanced once per solve.
    """

    custom = True

    def __init__(self, module: nn.Module, noise: Noise | None = None, usable: bool = True):
        super().__init__(module, usable)
        self.randomness, self.usable = SolveRandomness(noise), usable
        self.takes_context = takes_context(module)
        self.normalizes = any(isinstance(m, NORMS) for m in module.modules())
        # torch.jit silently loses forward-mode derivatives
        self.reverse = self.normalizes or any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        with self.randomness.at(x.device), differentiable_attention(vectorized()):
            out = self.module(*self._arguments(t, x, context))
        return self._checked(out, x, "returned")

    def _arguments(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Any, ...]:
        if self.takes_context:
            return _clones(t, x, context)
        if context is not None:
            raise ConfigError(
                f"context must be None for {self.name}.forward(t, x), got shape {tuple(context.shape)}: add a third argument, "
                "forward(t, x, context=None)"
            )
        return _clones(t, x)

    def _checked(self, out: Any, x: Tensor, what: str, lead: tuple[int, ...] = ()) -> Tensor:
        if not isinstance(out, Tensor):
            raise ConfigError(f"field {self.name} {what} a {type(out).__name__}; expected a tensor of x's shape {tuple(x.shape)}")
        if out.shape != (*lead, *x.shape):
            raise ConfigError(f"field {self.name} {what} shape {tuple(out.shape)}; expected {(*lead, *x.shape)}, as x has {tuple(x.shape)}")
        if not out.is_floating_point():
            raise ConfigError(f"field {self.name} {what} type {out.dtype}; expected floats, as x has {x.dtype}")
        return out.clone()

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self.own_jvp and self.reverse:
            if self.normalizes and torch.is_grad_enabled() and any(p.requires_grad for p in (x, *self.module.parameters())):
                raise NoForwardMode(
                    f"field {self.name} has layer norm, batch norm or instance norm, of which torch has no right derivative of the derivative along "
                    "the path: take GroupNorm or RMSNorm, or leave out what takes that derivative (directional, total derivative)"
                )
            return reverse_jvp(lambda s, y: self(s, y, context), t, x, v, t_dot)
        if not self.own_jvp:
            return super().jvp(t, x, v, context, t_dot=t_dot)
        with self.randomness.at(x.device), differentiable_attention():
            dx, product = self.module.jvp(*_clones(t, x, v, context), t_dot=t_dot)
        return self._checked(dx, x, "returned from jvp"), self._checked(product, x, "returned from jvp a product of", v.shape[:1])

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.closed_form:
            return super().divergence(t, x, context)
        with self.randomness.at(x.device), differentiable_attention():
            dx, div = self.module.divergence(*_clones(t, x, context))
        return self._checked(dx, x, "returned from divergence"), self._checked(div, x.flatten(1)[:, 0], "returned a divergence of")

    def check(self, t: Tensor, x: Tensor, context: Tensor | None) -> None:
        """Check that rows are independent, and detect random numbers, when due (:class:`~cnf.fields.findings.Findings`).

        Raises:
            ConfigError: if the value of a row depends on the other rows of its batch, or changes from call to call, or if the
                field needs a derivative by x that is not recorded.
        """
        if x.shape[0] == 0 or tracing(x):
            return
        mode = tuple((type(m), m.training) for m in self.module.modules())
        if (known := _CHECKED.known(self.module, mode)) is not None:
            vars(self).update(known)
            return
        try:
            other = self.twin()
            before = version(other.module.buffers())
            self.random, apart, again = other._compare_rows(t, x[:_ROWS], context)
        except Exception as error:  # not copyable, or bound to its own rows: the solve reports the error
            if "does not require grad" in str(error):
                raise ConfigError(
                    f"field {self.name} takes a derivative by x, which has none while samples are drawn or under no_grad: write "
                    "`with torch.enable_grad(): x = x.requires_grad_()` in front of it, in forward"
                ) from error
            self.whole = True
            _CHECKED.keep(self.module, mode, self._found())
            return
        self.stateful, self.reverse, self.normalizes = version(other.module.buffers()) > before, other.reverse, other.normalizes
        if again > _MIXING:
            raise ConfigError(
                f"field {self.name} returns another value for the same point when it is called again (they differ by {again:.1%} of its "
                "size): draw random numbers from torch's global generator (torch.rand, nn.Dropout), not from Python's, NumPy's or a "
                "separate generator, and keep no state from call to call"
            )
        self.whole = self.random  # other shapes draw other numbers
        if self.random and not self.module.training:
            warnings.warn(
                f"field {self.name} draws random numbers in evaluation mode, so that densities and samples differ from call to call: pass the "
                "same noise= to both, or make the field deterministic", stacklevel=2,
            )  # fmt: skip
        if not self.random and apart is None:
            return
        if not self.random and apart is not None and apart > _MIXING:
            raise ConfigError(
                f"field {self.name} returns another value for a row when other rows are next to it (they differ by {apart:.1%} of its "
                "size), so that rows have no separate densities: use statistics of one row (LayerNorm, GroupNorm) instead of the batch's"
            )
        _CHECKED.keep(self.module, mode, self._found())

    def _found(self) -> dict[str, bool]:
        return {name: getattr(self, name) for name in _FOUND}

    def twin(self) -> CustomField:
        """Return the field with a copy of its module, including counters and buffers."""
        twin = CustomField(_copy(self.module), self.randomness.noise, self.usable)
        twin.reverse = self.reverse
        return twin

    @torch.no_grad()
    def _compare_rows(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[bool, float | None, float]:
        """Return whether the field draws random numbers, and two changes relative to its size.

        The changes are that of the first row with the number of rows (None if unknown) and that from call to call."""
        values = []
        with draws_random_numbers(x.device) as drew:
            with Operations() as called:
                for rows in sorted({min(2, max(1, len(x) - 1)), len(x)}):
                    arguments = self._arguments(t, x[:rows], context_rows(context, slice(rows)))
                    values.append(self._checked(self.module(*arguments), x[:rows], "returned"))
            self.reverse, self.normalizes = self.reverse or called.unreliable, self.normalizes or called.normalizes
            calls = torch.stack([self(t, x, context_rows(context, slice(len(x)))) for _ in range(_CALLS)])
        size = float(values[-1].abs().max())
        if not 0 < size < float("inf"):  # zero at initialisation: checked again later
            return drew[0], None, 0.0
        again = float((calls - calls[0]).abs().max()) / size
        return drew[0], None if len(x) < 2 else float((values[1][0] - values[0][0]).abs().max()) / size, again


def _clones(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if v is None else v.clone() for v in tensors)


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy without hooks; tensors with a history, which torch does not copy, are detached."""
    held = [v for m in module.modules() for v in tree_leaves(vars(m)) if isinstance(v, Tensor) and not v.is_leaf]
    twin = copy.deepcopy(module, {id(v): v.detach().clone() for v in held})
    for m in twin.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            hooks.clear()
    return twin


def _refuse_batch_statistics(module: nn.Module) -> None:
    if not torch.compiler.is_compiling() and any(is_lazy(p) for p in (*module.parameters(), *module.buffers())):
        raise ConfigError(f"field {type(module).__name__} has lazy layers without weights: call it once, field(t, x), before it is solved")
    for name, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise ConfigError(
                f"{name or 'the field'} is a {type(m).__name__} that uses the statistics of the batch, so that a row's density would "
                "depend on the other rows: use GroupNorm or LayerNorm, or put that layer into eval mode (with running statistics)"
            )


def context_size(field: nn.Module) -> int | None:
    """Return the size C of the field's context, 0 for none; None for a custom field with an undeclared context size."""
    field = wrapped(field)
    size = stated(field, "context_dim")
    if size is None:
        return None if takes_context(field) else 0
    return int(size)
