"""Validation and isolation of custom vector fields, and selection of their optional methods."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from cnf.compilation import CompilationWarning
from cnf.deferral import tracing
from cnf.errors import ConfigError
from cnf.fields.randomness import SolveRandomness, draws_random_numbers
from cnf.fields.signature import takes_context, wrapped
from cnf.noise import Noise

__all__ = ["CustomField", "Field", "can_compile", "context_size", "intact", "prepared", "protect", "structure"]

Field = Callable[..., Tensor]
"""``field(t, x, context) -> dx``: a module or a field bound for one solve; ``jvp`` and ``divergence`` are optional."""

Structure = dict[str, tuple[type, tuple[str, ...]]]

_MIXING = 0.02  # relative change of a row's value allowed when its neighbours change (rounding, reduced precision)
_ROWS = 6  # rows of the batch in the comparison
_CALLS = 5  # repeated calls that must agree: a layer skipped at random is detected with probability 0.94
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
# (random, whole) of each module by mode
_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[bool, bool]]] = weakref.WeakKeyDictionary()


# --- optional methods -------------------------------------------------------------------------------------------


def structure(module: nn.Module) -> Structure:
    """Return class and own parameter names of every submodule, to detect later replacements."""
    return {name: (type(m), tuple(k for k, p in m._parameters.items() if p is not None)) for name, m in module.named_modules() if name}


def intact(field: nn.Module) -> bool:
    """Return whether the field has no hook, parametrisation or replaced layer, so that its weights determine its value.

    Fused and closed forms read the weights directly and are used only if this holds.
    """
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return False
    for m in field.modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if "forward" in vars(m) or "parametrizations" in m._modules:
            return False
    built: Structure | None = getattr(field, "built", None)
    if built is None:
        return True
    now = structure(field)
    return all(now.get(name) == entry for name, entry in built.items())


def _consistent(kind: type, name: str) -> bool:
    """Return whether a class defines ``name`` no higher in its MRO than the methods it must agree with."""

    def depth(method: str) -> int | None:
        return next((i for i, base in enumerate(kind.__mro__) if method in vars(base)), None)

    own = depth(name)
    rivals = ("forward", "jvp", "divergence") if name == "prepare" else ("forward",)
    return own is not None and all((other := depth(rival)) is None or own <= other for rival in rivals)


def _ours(field: nn.Module) -> bool:
    return type(field).__module__.partition(".")[0] == "cnf" and not getattr(field, "custom", False)


def protect(field: nn.Module | Field, noise: Noise | None = None) -> Field:
    """Return the field in callable form for a solver: built-in fields unchanged, custom ones validated and isolated.

    Args:
        field: an ``nn.Module`` with ``forward(t, x, context=None)`` or ``forward(t, x)``; other callables pass through.
        noise: randomness of random layers, drawn once for all calls; torch's global generator if None.

    Raises:
        ConfigError: from a call of the field, if its value is not a floating-point tensor of x's shape.
    """
    if not isinstance(field, nn.Module):
        return field
    usable = intact(field)
    return _BuiltIn(field) if usable and _ours(field) else CustomField(field, noise, usable)


def prepared(
    field: nn.Module | Field, x: Tensor, context: Tensor | None, noise: Noise | None = None, *, t: Tensor | None = None
) -> Field:
    """Return the field for one solve at points like x (N, \\*event), with everything independent of t precomputed.

    Returns ``field.prepare(x, context)`` if its class has a ``prepare`` that agrees with its ``forward`` and the field
    is :func:`intact`, else :func:`protect`'s result. ``t`` is the time at which a custom field is checked, 0.5 if None.

    Raises:
        ConfigError: for a field whose value of a row depends on the other rows, such as one with batch statistics.
    """
    if isinstance(field, nn.Module) and _consistent(type(field), "prepare") and intact(field):
        return field.prepare(x, context)  # type: ignore[no-any-return, operator]
    bound = protect(field, noise)
    if isinstance(bound, CustomField):
        _refuse_batch_statistics(bound.module)
        bound.check(x.new_full((), 0.5) if t is None else t, x, context)
    return bound


class _BuiltIn:
    """Built-in field, called without protection."""

    def __init__(self, module: nn.Module):
        self.module = module
        kind: Any = module
        self.jvp: Any = kind.jvp if _consistent(type(module), "jvp") else None
        self.divergence: Any = kind.divergence if _consistent(type(module), "divergence") else None
        self.closed_form = self.divergence is not None and bool(getattr(module, "closed_form", True))

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        value: Tensor = self.module(t, x, context)
        return value


class CustomField:
    """Custom field, isolated for one solve.

    The field receives copies of t, x and context, which it may overwrite. Its random layers draw the same numbers at
    every call. Its value must be a floating-point tensor of x's shape and is copied, since a later call may overwrite
    it.

    Args:
        module: the field.
        noise: randomness of random layers; torch's global generator if None, advanced once per solve.
        usable: whether ``jvp`` and ``divergence`` of the module may be used.
    """

    def __init__(self, module: nn.Module, noise: Noise | None = None, usable: bool = True):
        self.module, self.randomness = module, SolveRandomness(noise)
        self.takes_context = takes_context(module)
        self.random = False  # whether the field draws random numbers
        self.whole = False  # whether rows must be evaluated together
        kind = type(module)
        # None: use autodiff
        self.jvp = self._jvp if usable and _consistent(kind, "jvp") else None
        self.divergence = self._divergence if usable and _consistent(kind, "divergence") else None
        self.closed_form = self.divergence is not None and bool(getattr(module, "closed_form", True))
        # whether to use reverse mode; torch.jit silently loses forward-mode derivatives
        self.reverse = any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())
        self.usable = usable

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event)."""
        with self.randomness.at(x.device):
            out = self.module(*self._copies(t, x, context))
        return self._checked(out, x, "returned")

    def _copies(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Any, ...]:
        if self.takes_context:
            return t.clone(), x.clone(), None if context is None else context.clone()
        if context is not None:
            raise ConfigError(
                f"context has shape {tuple(context.shape)}, but {self._name}.forward(t, x) takes none: add a third argument, "
                "forward(t, x, context=None)"
            )
        return t.clone(), x.clone()

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def _checked(self, out: Any, x: Tensor, what: str, lead: tuple[int, ...] = ()) -> Tensor:
        if not isinstance(out, Tensor):
            raise ConfigError(f"field {self._name} {what} a {type(out).__name__}; expected a tensor of x's shape {tuple(x.shape)}")
        if out.shape != (*lead, *x.shape):
            raise ConfigError(f"field {self._name} {what} shape {tuple(out.shape)}; expected {(*lead, *x.shape)}, as x has {tuple(x.shape)}")
        if not out.is_floating_point():
            raise ConfigError(f"field {self._name} {what} type {out.dtype}; expected floats, as x has {x.dtype}")
        return out.clone()

    def _jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        owner: Any = self.module
        with self.randomness.at(x.device):
            dx, product = owner.jvp(t.clone(), x.clone(), v.clone(), None if context is None else context.clone(), t_dot=t_dot)
        return self._checked(dx, x, "returned from jvp"), self._checked(product, x, "returned from jvp a product of", v.shape[:1])

    def _divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        owner: Any = self.module
        with self.randomness.at(x.device):
            dx, div = owner.divergence(t.clone(), x.clone(), None if context is None else context.clone())
        return self._checked(dx, x, "returned from divergence"), self._checked(div, x.flatten(1)[:, 0], "returned a divergence of")

    def check(self, t: Tensor, x: Tensor, context: Tensor | None) -> None:
        """Check, once per mode of the module, that rows are independent, and detect random numbers.

        Raises:
            ConfigError: if the value of a row depends on the other rows of its batch, or changes from call to call.
        """
        if x.shape[0] == 0 or tracing(x):
            return
        known = _CHECKED.setdefault(self.module, {})
        mode = hash(tuple((type(m), m.training) for m in self.module.modules()))
        if mode in known:
            self.random, self.whole = known[mode]
            return
        try:
            other = self.twin()
            self.random, apart, again = other._compare_rows(t, x[:_ROWS], context)
        except Exception:  # not copyable, or bound to its own rows: the solve reports the error
            self.whole = True
            known[mode] = (False, True)
            return
        if again > _MIXING:
            raise ConfigError(
                f"field {self._name} returns another value for the same point when it is called again (they differ by {again:.1%} of its "
                "size): draw random numbers from torch's global generator (torch.rand, nn.Dropout), not from Python's, NumPy's or one of the "
                "field's own, and keep no state from call to call"
            )
        self.whole = self.random  # other shapes draw other numbers
        if not self.random and apart is None:
            return
        if not self.random and apart is not None and apart > _MIXING:
            raise ConfigError(
                f"field {self._name} returns another value for a row when other rows are next to it (they differ by {apart:.1%} of its "
                "size), so that no row has a density of its own: use statistics of one row (LayerNorm, GroupNorm) in place of the batch's"
            )
        known[mode] = (self.random, self.whole)

    def twin(self) -> CustomField:
        """Return the field with a copy of its module, including counters and buffers."""
        return CustomField(_copy(self.module), self.randomness.noise, self.usable)

    @torch.no_grad()
    def _compare_rows(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[bool, float | None, float]:
        """Return whether the field draws random numbers, and two changes relative to its size.

        The changes are that of the first row with the number of rows (None if unknown) and that from call to call."""
        values = []
        with draws_random_numbers(x.device) as drew:
            for rows in sorted({min(2, max(1, len(x) - 1)), len(x)}):
                given = context if context is None or context.ndim == 1 else context[:rows]
                values.append(self._checked(self.module(*self._copies(t, x[:rows], given)), x[:rows], "returned"))
            calls = torch.stack([self(t, x, context if context is None or context.ndim == 1 else context[: len(x)]) for _ in range(_CALLS)])
        size = float(values[-1].abs().max())
        if not 0 < size < float("inf"):  # zero at initialisation: checked again later
            return drew[0], None, 0.0
        again = float((calls - calls[0]).abs().max()) / size
        return drew[0], None if len(x) < 2 else float((values[1][0] - values[0][0]).abs().max()) / size, again


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy without hooks."""
    twin = copy.deepcopy(module)
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
    stated = [field] if not _ours(field) else list(field.modules())
    found = [getattr(m, "context_dim", None) for m in stated]
    sizes = [int(c) for c in found if c is not None]
    if sizes or _ours(field):
        return max(sizes, default=0)
    return None if takes_context(field) else 0


def can_compile(field: Field, label: str) -> bool:
    """Return whether evaluations may be compiled; warn if the custom field of block ``label`` draws random numbers.

    Such a field starts every evaluation from the same random state, which compiled code cannot set.
    """
    if not getattr(field, "random", False):
        return True
    warnings.warn(f"compile=True: {label} draws random numbers (dropout?) and runs uncompiled", CompilationWarning, stacklevel=2)
    return False
