"""Base class of vector fields with every optional capability and its default, and the form in which a solve calls them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cnf._utils.compilation import CompilationWarning
from cnf._utils.errors import ConfigError
from cnf.fields.autodiff import autodiff_jvp
from cnf.solvers.adams import Semilinear
from cnf.solvers.interpolant import Interpolant

__all__ = ["FusedField", "SolveField", "SolveFunctions", "Structure", "VectorField", "can_compile", "consistent", "intact", "structure"]

Structure = dict[str, tuple[type, tuple[str, ...]]]

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


class SolveField:
    """Vector field as one solve calls it: ``field(t, x, context) -> dx``, with optional capabilities and their defaults."""

    name = "the field"
    """Its name in messages."""
    custom = False
    """True if the code of the field is not part of this package."""
    random = False
    """Whether it draws random numbers; such a field is not compiled."""
    stateful = False
    """True if an evaluation changes its buffers, as with spectral_norm in training; such a field is not compiled."""
    whole = False
    """Whether rows must be evaluated together."""
    reverse = False
    """Whether its derivatives need reverse mode."""
    own_jvp = False
    """Whether :meth:`jvp` does without autodiff."""
    closed_form = False
    """Whether :meth:`divergence` is available."""
    semilinear: Callable[[Tensor], Semilinear] | None = None
    """The linear part of f at times (T,), for :class:`~cnf.solvers.ExponentialAdams`; None if it is not known."""

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event)."""
        raise NotImplementedError

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t for K stacked tangents v (K, N, \\*event); by autodiff unless overridden."""
        return autodiff_jvp(lambda s, y: self(s, y, context), t, x, v, t_dot)

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and its exact divergence (N,).

        Raises:
            ConfigError: unless overridden.
        """
        raise _no_closed_form(self.name)

    def at_times(self, t: Tensor, *, divergence: bool) -> list[SolveField] | None:
        """Return the field at each of the times t (S,), with all that depends on t alone computed in one product.

        ``divergence`` includes what :meth:`divergence` needs. None, the default: nothing is gained by knowing the times.
        """
        return None

    def keep_kernel(self, t: Tensor) -> None:
        """Compute now what :meth:`divergence` would otherwise compute on first use and keep for all t."""


class SolveFunctions(SolveField):
    """Field of one function ``call(t, x, context)`` and, if given, a function in place of :meth:`jvp`."""

    def __init__(self, call: Callable[..., Tensor], jvp: Callable[..., tuple[Tensor, Tensor]] | None = None):
        self.call, self.own_jvp, self.fused = call, jvp is not None, jvp

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.call(t, x, context)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.fused is None:
            return super().jvp(t, x, v, context, t_dot=t_dot)
        return self.fused(t, x, v, context, t_dot=t_dot)


class VectorField(nn.Module):
    r"""Base class of vector fields dx/dt = f(t, x, context).

    Only :meth:`forward` is required. The other methods and attributes are optional capabilities; each has a default. An
    inherited :meth:`jvp`, :meth:`divergence` or :meth:`precompute` is used only if it belongs to the same class as
    :meth:`forward` or a subclass of it: a subclass of :class:`MLP` that overrides ``forward`` alone is differentiated by
    autodiff. Any ``nn.Module`` with ``forward(t, x, context=None)`` or ``forward(t, x)`` is accepted as a field, too.

    Example:
        >>> import torch
        >>> from cnf import CNF, Flow, VectorField
        >>> class Field(VectorField):
        ...     context_dim = 0
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 2)
        ...     def forward(self, t, x, context=None):
        ...         return torch.tanh(self.net(x)) * (1 - t)
        >>> Flow(CNF(Field()), (2,)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    context_dim: int | None = None
    """Size C of the context, 0 for none; None if undeclared."""
    time_rows: bool = False
    """Whether t may be (N,), one time per row; flow matching then evaluates all its times in one call."""
    interpolant: Interpolant = Interpolant()
    """Path between data and noise for which the field is built; flow matching trains along it."""
    custom: bool = False
    """Whether the field runs code that is not part of this package; true for every class of another package."""
    built: Structure | None = None
    """Result of :func:`structure` at construction, for fields that read the weights of their layers directly."""

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event) at time t (), or (N,) with ``time_rows``, x (N, \\*event) and context (N, C) or (C,)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(t, x, context=None)")

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and its derivative along K stacked tangents; by forward-mode autodiff unless overridden.

        Args:
            t: time ().
            x: point (N, \\*event).
            v: tangents (K, N, \\*event).
            context: (N, C), (C,) or None.
            t_dot: derivative of t along every tangent, for the total derivative J v + t_dot ∂f/∂t: a scalar tensor, or
                (k,) for an augmented time a (k,) in place of t.

        Returns:
            dx (N, \\*event) and J v (K, N, \\*event).
        """
        return autodiff_jvp(lambda s, y: self(s, y, context), t, x, v, t_dot)

    @property
    def closed_form(self) -> bool:
        """Whether :meth:`divergence` may be used: by default, whether it is overridden."""
        return type(self).divergence is not VectorField.divergence and consistent(type(self), "divergence")

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and its exact divergence (N,) in closed form.

        Raises:
            ConfigError: if there is no closed form.
        """
        raise _no_closed_form(type(self).__name__)

    def precompute(self, x: Tensor, context: Tensor | None = None) -> SolveField | None:
        """Return the field for one solve at points like x (N, \\*event), with everything independent of t and x computed.

        None, the default: the field is called as it is.
        """
        return None

    def fit_batches(self, batches: Iterable[Tensor]) -> None:
        """Fit to statistics of the training data, given in batches as they enter the block; nothing by default."""


class FusedField(VectorField):
    """Base class of fields whose :meth:`precompute` reads the weights of their layers, which :func:`intact` must allow.

    Subclasses implement :meth:`precompute` and :meth:`called`, which calls the layers as modules.
    """

    def precompute(self, x: Tensor, context: Tensor | None = None) -> SolveField:
        """Return the field for one solve at points like x (N, \\*event), with everything independent of t and x computed."""
        raise NotImplementedError

    def called(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Return dx/dt by calling all layers as modules, so that hooks and replaced modules apply; nothing is fused."""
        raise NotImplementedError

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event) at x (N, \\*event) and t (), or with ``time_rows`` t (N,), one time per row."""
        return self.precompute(x, context)(t, x) if intact(self) else self.called(t, x, context)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t for K stacked tangents, f computed once; see :meth:`VectorField.jvp`."""
        if not intact(self):
            return super().jvp(t, x, v, context, t_dot=t_dot)
        return self.precompute(x, context).jvp(t, x, v, t_dot=t_dot)


def _no_closed_form(name: str) -> ConfigError:
    return ConfigError(f"{name} has no closed-form divergence: use Exact(), which falls back to autodiff, or Hutchinson()")


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
    if not isinstance(field, VectorField) or field.built is None:
        return True
    now = structure(field)
    return all(now.get(name) == entry for name, entry in field.built.items())


def consistent(kind: type, name: str) -> bool:
    """Return whether a class defines ``name`` no higher in its MRO than the methods it must agree with."""

    def depth(method: str) -> int | None:
        return next((i for i, base in enumerate(kind.__mro__) if method in vars(base)), None)

    own = depth(name)
    rivals = ("forward", "jvp", "divergence") if name == "precompute" else ("forward",)
    return own is not None and all((other := depth(rival)) is None or own <= other for rival in rivals)


def can_compile(field: SolveField, label: str) -> bool:
    """Return whether evaluations may be compiled; else warn.

    A custom field that draws random numbers starts every evaluation from the same random state, which compiled code
    cannot set, and one that changes its buffers would overwrite what the compiled backward pass reads.
    """
    if not (field.random or field.stateful):
        return True
    does = "draws random numbers (dropout?)" if field.random else "changes its buffers (spectral_norm in training?)"
    warnings.warn(f"compile=True: {label} {does} and runs uncompiled", CompilationWarning, stacklevel=2)
    return False
