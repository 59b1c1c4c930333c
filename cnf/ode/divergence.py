"""f, div f and ‖J‖²_F in one evaluation: exact trace and Hutchinson's estimate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cnf._utils.aliases import renamed_arguments
from cnf._utils.async_checks import vectorized
from cnf._utils.errors import ConfigError, require_at_least, unknown_name
from cnf.fields.autodiff import NoForwardMode, differentiable_attention
from cnf.fields.custom import AnyField, protect
from cnf.random import Kind, Noise, draw

__all__ = ["Bound", "Divergence", "Exact", "Hutchinson", "Linearization", "checked_need", "closed", "jacobian_product"]

NEEDS = ("div", "jac_sq")
_CHUNK_NUMEL = 2**22  # entries of tangents per chunk of the exact trace: 16 MB in float32


class Linearization(NamedTuple):
    """Result of one evaluation; parts that were not requested are None.

    ``dx`` (N, \\*event); ``div`` (N,); ``jac_sq`` (N,), the squared Frobenius norm of J = ∂f/∂x; ``product``
    (P, N, \\*event), the Jacobian product: eᵀJ in reverse mode, J e in forward mode.
    """

    dx: Tensor
    div: Tensor | None = None
    jac_sq: Tensor | None = None
    product: Tensor | None = None


class Divergence(Protocol):
    """Divergence strategy: :class:`Exact` or :class:`Hutchinson`."""

    def probe(self, x: Tensor, noise: Noise | None, need: frozenset[str], field: AnyField) -> Tensor | None:
        """Draw the probe of one solve (P, N, \\*event), fixed during the solve; None if none is needed."""

    def linearize(
        self, field: AnyField, t: Tensor, x: Tensor, probe: Tensor | None, context: Tensor | None, need: frozenset[str]
    ) -> Linearization:
        """Return f, div f and ‖J‖²_F at one point, computing only what ``need`` lists.

        Args:
            field: vector field, called as ``field(t, x, context)``.
            t: time ().
            x: point (N, \\*event).
            probe: result of :meth:`probe`.
            context: (N, C), (C,) or None.
            need: one or both of ``"div"`` and ``"jac_sq"``.
        """


def checked_need(need: Iterable[str]) -> frozenset[str]:
    """Return the terms that integrands need, or raise a ConfigError for an unknown one."""
    wanted = frozenset(need)
    if unknown := wanted - set(NEEDS):
        raise unknown_name("need", min(unknown), NEEDS)
    return wanted


class Bound:
    """Field with a fixed context, as passed to quadratures: ``f(t, x)`` and ``f.jvp(t, x, v)``.

    Args:
        field: vector field.
        context: (N, C), (C,) or None.
        time: augmented time a (k,), at which the field is evaluated for any t; None if it takes t.
        drift: da/dt (k,), so that derivatives in t follow a.
    """

    def __init__(self, field: AnyField, context: Tensor | None = None, time: Tensor | None = None, drift: Tensor | None = None):
        self.field, self.context, self.time, self.drift = protect(field), context, time, drift

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Return f(t, x) (N, \\*event)."""
        return self.field(t if self.time is None else self.time, x, self.context).to(x.dtype)

    def jvp(self, t: Tensor, x: Tensor, v: Tensor, *, t_dot: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t for K stacked tangents v (K, N, \\*event); never vᵀJ."""
        if self.time is not None:
            t, t_dot = self.time, None if t_dot is None or self.drift is None else t_dot * self.drift
        dx, product = self.field.jvp(t, x, v, self.context, t_dot=t_dot)
        return dx.to(x.dtype), product.to(x.dtype)


class Exact:
    r"""Exact trace of the Jacobian.

    With a closed form (``field.divergence``) it costs about one evaluation. Otherwise the D unit tangents are pushed
    through the field in vectorised chunks; while gradients are recorded every chunk but the first is checkpointed,
    which bounds the memory. ``jac_sq`` has no closed form: with a closed-form trace it is estimated by one Rademacher
    product, :math:`\|Je\|^2`, unbiased (a CNF in training on a fixed grid takes it at one random stage of the solve);
    with the D tangents it is exact.

    Args:
        chunk: number of tangents per chunk; None chooses by memory.
        closed_form: whether to use a closed form; False always uses the D tangents.

    Raises:
        ConfigError: for a chunk below 1.

    Example:
        >>> from cnf.fields import MLP
        >>> x = torch.randn(3, 2)
        >>> need = frozenset({"div", "jac_sq"})
        >>> Exact(closed_form=False).linearize(MLP(2), torch.tensor(0.0), x, None, None, need).jac_sq.shape
        torch.Size([3])
    """

    def __init__(self, chunk: int | None = None, closed_form: bool = True):
        require_at_least(1, chunk=chunk)
        self.chunk, self.closed_form = chunk, closed_form

    def __repr__(self) -> str:
        return "Exact()" if self.closed_form else "Exact(closed_form=False)"

    def probe(self, x: Tensor, noise: Noise | None, need: frozenset[str], field: AnyField) -> Tensor | None:
        """Draw a Rademacher probe for ‖J‖²_F with a closed-form trace; None otherwise."""
        if "jac_sq" not in need or not closed(self, field):
            return None
        return draw(noise, "probe", "rademacher", (1, *x.shape), dtype=x.dtype, device=x.device, batch_dim=1)

    def linearize(
        self, field: AnyField, t: Tensor, x: Tensor, probe: Tensor | None, context: Tensor | None, need: frozenset[str]
    ) -> Linearization:
        """Evaluate the field once; see :meth:`Divergence.linearize`."""
        field = protect(field)
        if self.closed_form and field.closed_form:
            dx, div = (part.to(x.dtype) for part in field.divergence(t, x, context))
            if "jac_sq" not in need:
                return Linearization(dx, div)
            if probe is None:
                raise ConfigError("probe=None, but ‖J‖²_F with a closed-form trace needs a probe: pass the result of divergence.probe(...)")
            product = Bound(field, context).jvp(t, x, probe)[1]
            return Linearization(dx, div, _mean_square(product), product)
        return self._tangents(Bound(field, context), t, x)

    def _tangents(self, field: Bound, t: Tensor, x: Tensor) -> Linearization:
        dim = x.flatten(1).shape[1]
        # a graph for any batch size cannot have chunks that depend on it
        size = self.chunk or (dim if torch.compiler.is_compiling() else max(1, min(dim, _CHUNK_NUMEL // max(1, x.numel()))))

        def part(first: int, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            k = min(size, dim - first)
            # built on the device: an index from the CPU would synchronise with the GPU
            unit = pad(torch.eye(k, dtype=x.dtype, device=x.device), (first, dim - first - k))
            v = unit.reshape(k, 1, *x.shape[1:]).expand(k, *x.shape)
            v = v.contiguous() if torch.compiler.is_compiling() else v  # jvp: symbolic shapes exclude strides of 0
            dx, product = jacobian_product(field, t, y, v)
            columns = product.flatten(2)
            diagonal = columns[:, :, first : first + k].diagonal(dim1=0, dim2=2)
            return dx, diagonal.sum(1), columns.square().sum((0, 2))

        def later(first: int) -> tuple[Tensor, Tensor, Tensor]:
            if torch.is_grad_enabled() and not vectorized():
                try:
                    with set_checkpoint_early_stop(False):  # which torch.jit takes for an error
                        chunk: tuple[Tensor, Tensor, Tensor] = checkpoint(part, first, x, use_reentrant=False, preserve_rng_state=False)
                    return chunk
                except RuntimeError as error:  # torch.func inside of the field
                    if "saved tensor hooks" not in str(error):
                        raise
            return part(first, x)

        dx, div, square = part(0, x)
        for first in range(size, dim, size):
            _, d, s = later(first)
            div, square = div + d, square + s
        return Linearization(dx, div, square)


def closed(divergence: Divergence, field: AnyField) -> bool:
    """Return whether the trace of this field is computed in closed form."""
    return isinstance(divergence, Exact) and divergence.closed_form and protect(field).closed_form


def jacobian_product(field: Bound, t: Tensor, x: Tensor, v: Tensor, mode: str = "forward") -> tuple[Tensor, Tensor]:
    """Return f and J v for v (K, N, \\*event), or vᵀJ in reverse mode and where an operation has no forward mode."""
    if torch.compiler.is_exporting() and (mode == "reverse" or not field.field.own_jvp):
        raise ConfigError(
            "torch.export records no derivative by autodiff: for log_prob give the field a jvp(t, x, v, context, *, t_dot=None), or take one "
            "with a closed-form divergence (MLP); encode and decode need none"
        )
    if mode == "forward" and not field.field.reverse:
        try:
            return field.jvp(t, x, v)
        except NoForwardMode:
            if not field.field.custom:
                raise
            field.field.reverse = True
    return _vjp(field, t, x, v)


def _vjp(field: Bound, t: Tensor, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and eᵀJ for every probe, by plain autograd: torch.func.vjp does not run inside a checkpoint."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad(), differentiable_attention(field.field.custom):
        point = x if recording and x.requires_grad else x.detach().requires_grad_()
        dx = field(t, point)
        if dx.requires_grad:  # a field may not depend on x (a drift, for example): its derivative is then zero
            options: dict[str, bool] = {"create_graph": recording, "retain_graph": True, "materialize_grads": True}
            product = torch.stack([torch.autograd.grad(dx, point, e, **options)[0] for e in probe])
        else:
            product = torch.zeros_like(probe)
    return (dx, product) if recording else (dx.detach(), product)


class Hutchinson:
    r"""Hutchinson's estimate of the trace and the norm of the Jacobian (FFJORD, 1810.01367; RNODE, 2002.02798, eq. 16).

    With a probe e, :math:`\mathrm{tr} J \approx e^\top J e` and, from the same product,
    :math:`\|J\|_F^2 \approx \|e^\top J\|^2` (reverse mode) or :math:`\|J e\|^2` (forward mode).

    Args:
        distribution: of the probe, ``"rademacher"`` (lower variance for a dominant diagonal) or ``"gaussian"``.
        mode: ``"forward"`` computes J e together with f in one pass; ``"reverse"`` computes eᵀJ, as the published codes
            do. Trace and norm are unbiased in both; for the same probe both give the same trace.
        probes: number of probes to average.

    Raises:
        ConfigError: for an unknown distribution or mode, or fewer than one probe.
    """

    @renamed_arguments(noise="distribution")
    def __init__(
        self,
        distribution: Literal["rademacher", "gaussian"] = "rademacher",
        mode: Literal["forward", "reverse"] = "forward",
        probes: int = 1,
    ):
        if distribution not in ("rademacher", "gaussian"):
            raise unknown_name("distribution", distribution, ("rademacher", "gaussian"))
        if mode not in ("forward", "reverse"):
            raise unknown_name("mode", mode, ("forward", "reverse"))
        require_at_least(1, probes=probes)
        self.distribution, self.mode, self.probes = distribution, mode, probes

    def __repr__(self) -> str:
        return f"Hutchinson(distribution={self.distribution!r}, mode={self.mode!r}, probes={self.probes})"

    def probe(self, x: Tensor, noise: Noise | None, need: frozenset[str], field: AnyField) -> Tensor | None:
        """Draw the probe (P, N, \\*event) of one solve; None if nothing is requested."""
        if not need:
            return None
        kind: Kind = "normal" if self.distribution == "gaussian" else "rademacher"
        return draw(noise, "probe", kind, (self.probes, *x.shape), dtype=x.dtype, device=x.device, batch_dim=1)

    def linearize(
        self, field: AnyField, t: Tensor, x: Tensor, probe: Tensor | None, context: Tensor | None, need: frozenset[str]
    ) -> Linearization:
        """Evaluate the field once; see :meth:`Divergence.linearize`."""
        if probe is None:
            raise ConfigError("probe=None, but Hutchinson's estimate needs a probe: pass the result of divergence.probe(...)")
        dx, product = jacobian_product(Bound(field, context), t, x, probe, self.mode)
        div = (product * probe).flatten(2).sum(2).mean(0) if "div" in need else None
        return Linearization(dx, div, _mean_square(product) if "jac_sq" in need else None, product)


def _mean_square(product: Tensor) -> Tensor:
    """Return the squared norm (N,) of (P, N, \\*event), averaged over probes."""
    return product.flatten(2).square().sum(2).mean(0)
