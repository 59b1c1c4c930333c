"""AFFJORD: a learned augmented time a(t) and the layers conditioned on it in place of t (2306.02731).

A conditioned layer is a :class:`~cnf.fields.TimeLayer` whose time is the vector a (k,). W, gate and shift are functions
of a, computed once per evaluation; fused tangents, closed-form traces and context work unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, require_at_least, unknown_name
from cnf.fields.maps import Conv, Linear
from cnf.fields.time import Affine, Constants, TimeLayer, planes

__all__ = ["AUGMENTED_TIME_LAYERS", "PATH_NONLINEARITIES", "AugmentedTimeConditioning", "TimePath", "check_augmented_time", "check_time"]

PATH_NONLINEARITIES: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "softplus": nn.Softplus, "elu": nn.ELU, "swish": nn.SiLU, "relu": nn.ReLU,
}  # fmt: skip


class TimePath(nn.Module):
    """Learned augmented time a(t) (1, k): da/dt = g(a), g a small net independent of x (AFFJORD, 2306.02731, eq. 17).

    Args:
        k: size of a.
        hidden: width of the hidden layer of g; k if None.
        learn_start: learn a(0); otherwise a(0) = 0.
        nonlinearity: activation of the hidden layer of g: tanh, softplus, elu, swish or relu.

    Raises:
        ConfigError: for sizes below 1 or an unknown nonlinearity.

    Example:
        >>> path = TimePath(20)
        >>> a = path.start(torch.zeros(()))
        >>> a.shape, path(a).shape
        (torch.Size([1, 20]), torch.Size([1, 20]))
    """

    def __init__(self, k: int = 20, hidden: int | None = None, learn_start: bool = False, nonlinearity: str = "tanh"):
        super().__init__()
        width = k if hidden is None else hidden
        require_at_least(1, k=k, hidden=width)
        if nonlinearity not in PATH_NONLINEARITIES:
            raise unknown_name("nonlinearity", nonlinearity, PATH_NONLINEARITIES)
        self.k = k
        self.net = nn.Sequential(nn.Linear(k, width), PATH_NONLINEARITIES[nonlinearity](), nn.Linear(width, k))
        self.initial = nn.Parameter(torch.zeros(k)) if learn_start else None

    def start(self, x: Tensor) -> Tensor:
        """Return a(0) (1, k) with the dtype and device of x."""
        return x.new_zeros(1, self.k) if self.initial is None else self.initial.to(x)[None]

    def forward(self, a: Tensor) -> Tensor:
        """Return da/dt = g(a) (1, k)."""
        value: Tensor = self.net(a)
        return value


@dataclass(frozen=True)
class AugmentedTimeConditioning:
    """Conditioning of all layers of a field on the augmented time a; pass it as the field's ``layer``.

    Args:
        kind: ``"concat"``: W [a; x] + b, with a as k constant features or channels, zero-padded like x; ``"hyper"``:
            weight and bias are linear in the first ``m`` entries of a; ``"both"``: the paper's field f([x, a], θ(a)),
            with W(a) [a; x] + b(a) in the first layer and "hyper" in the others.
        k: size of a.
        m: number of entries of a that generate weights, 10 in the released code (``"hyper"`` and ``"both"``).
        rank: 0 for a full generator, with (m + 1) times the parameters; r > 0 for W₀ + U diag(S a) V with factors of
            rank r, with few parameters more than a plain layer (``"hyper"`` and ``"both"``).

    Raises:
        ConfigError: for an unknown kind or sizes out of range.

    Example:
        >>> from cnf.fields import MLP
        >>> field = MLP(2, (16, 16), AugmentedTimeConditioning("hyper", k=8, m=4))
        >>> a = torch.zeros(8)
        >>> dx, div = field.divergence(a, torch.randn(5, 2))
        >>> dx.shape, div.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    kind: str = "hyper"
    k: int = 20
    m: int = 10
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind not in AUGMENTED_TIME_LAYERS:
            raise unknown_name("kind", self.kind, AUGMENTED_TIME_LAYERS)
        require_at_least(1, k=self.k)
        if self.kind != "concat" and not 1 <= self.m <= self.k:
            raise ConfigError(f"m must be between 1 and k={self.k}, got m={self.m}: it is the number of entries of a that generate weights")
        if self.rank < 0:
            raise ConfigError(f"rank must be 0 (a full generator) or the rank of its factors, got rank={self.rank}")

    @property
    def after_first(self) -> AugmentedTimeConditioning:
        """Conditioning of the layers after the first: "both" becomes "hyper": a is an input of the first layer."""
        return replace(self, kind="hyper") if self.kind == "both" else self

    def __call__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True) -> TimeLayer:
        """Return the conditioned layer around a linear map (see :class:`~cnf.fields.LayerFactory`)."""
        return AUGMENTED_TIME_LAYERS[self.kind](map, self, context_dim)


def check_time(a: Tensor, conditioning: AugmentedTimeConditioning, rows: bool) -> None:
    """Check that ``a`` is an augmented time (k,), or with ``rows`` one per row (N, k).

    Raises:
        ConfigError: with the actual and the expected shape.
    """
    if a.shape[-1:] == (conditioning.k,) and a.ndim == 2 and not rows:
        raise ConfigError(
            f"t has shape {tuple(a.shape)}, but a layer with weights from the augmented time ({conditioning.kind!r}) has one set of "
            f"weights per time: pass a single augmented time ({conditioning.k},)"
        )
    if a.shape[-1:] != (conditioning.k,) or a.ndim > 1 + rows:
        raise ConfigError(
            f"t has shape {tuple(a.shape)}, but a layer conditioned on the augmented time ({conditioning.kind!r}) takes a "
            f"({conditioning.k},) in place of t: give the CNF path=TimePath({conditioning.k})"
        )


class _AugmentedTimeLayer(TimeLayer):
    """Base class of layers conditioned on a in place of t."""

    def __init__(self, map: Linear | Conv, conditioning: AugmentedTimeConditioning, context_dim: int = 0):
        super().__init__(map, context_dim)
        self.conditioning, self.augmented_time = conditioning, conditioning.k


class AugmentedTimeConcat(_AugmentedTimeLayer):
    """W [a; x] + b, with a first."""

    def __init__(self, map: Linear | Conv, conditioning: AugmentedTimeConditioning, context_dim: int = 0):
        super().__init__(map, conditioning, context_dim)
        self.core = map.module(extra=conditioning.k)

    def constants(self, size: tuple[int, ...]) -> Constants:
        weight, bias = self.core.weight, self.core.bias  # respects functional_call
        time_weight, rest = self.map.split(weight, self.conditioning.k)
        # constant planes enter linearly: map k planes of ones once for all times, (k, out, *size)
        one = torch.eye(self.conditioning.k, dtype=weight.dtype, device=weight.device)
        time_planes = self.map.apply(time_weight, one.reshape(*one.shape, *(1,) * len(size)).expand(-1, -1, *size))
        return rest, time_planes, self._spread(bias)

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        check_time(t, self.conditioning, rows=True)
        weight, time_planes, bias = constants
        return Affine(weight, None, torch.tensordot(t, time_planes, 1) + bias)

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        check_time(t, self.conditioning, rows=True)
        return cast(Tensor, self.core(torch.cat([planes(t, x), x], 1)))


class AugmentedTimeHyper(_AugmentedTimeLayer):
    """Weight and bias linear in a[:m], with a full generator or low-rank factors."""

    time_weights = True
    takes_a = False  # whether a is also an input of the layer

    def __init__(self, map: Linear | Conv, conditioning: AugmentedTimeConditioning, context_dim: int = 0):
        super().__init__(map, conditioning, context_dim)
        m, r = conditioning.m, conditioning.rank
        weight, self.bias = (nn.Parameter(p.detach()) for p in map.module().parameters())  # θ(0), like a plain layer
        if self.takes_a:
            # a's weights start at zero, so that f starts like hyper's. Drawn for k + D inputs, x's are a third as large
            # (k = 20, D = 2): 600 steps on the checkerboard reached 3.87 nats instead of 3.63 (one seed)
            shape = list(weight.shape)
            shape[map.input_axis] = conditioning.k
            weight = nn.Parameter(torch.cat([torch.zeros(shape), weight.detach()], map.input_axis))
        self.weight = weight
        self.move_bias = nn.Parameter(torch.zeros(map.outputs, m))
        if r == 0:
            self.move = nn.Parameter(torch.zeros(*self.weight.shape, m))
            return
        rows, columns = self.weight.shape[0], self.weight[0].numel()
        # one factor is zero: the layer starts as a plain one; the other factors get gradients from the second step on
        self.left = nn.Parameter(torch.zeros(rows, r))
        self.scales = nn.Parameter(torch.randn(r, m))
        self.right = nn.Parameter(torch.randn(r, columns) / columns**0.5)

    def zero_(self) -> None:
        scales = {"scales", "right"}
        for name, p in self.named_parameters():
            if name not in scales:  # with all factors zero their gradients would stay zero
                nn.init.zeros_(p)

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        weight, bias = self._generate(t)
        return Affine(weight, None, self._spread(bias))

    def _generate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias at the augmented time ``t``."""
        check_time(t, self.conditioning, rows=False)
        v = t[: self.conditioning.m]
        if self.conditioning.rank == 0:
            weight = self.weight + self.move @ v
        else:
            weight = self.weight + ((self.left * (self.scales @ v)) @ self.right).reshape(self.weight.shape)
        return weight, self.bias + self.move_bias @ v


class AugmentedTimeBoth(AugmentedTimeHyper):
    """W(a) [a; x] + b(a), with a first: generated weights, and a as input features or channels."""

    takes_a = True

    def constants(self, size: tuple[int, ...]) -> Constants:
        return (self.weight.new_ones(1, 1, *size),)

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        weight, bias = self._generate(t)
        time_weight, rest = self.map.split(weight, self.conditioning.k)
        # a's k constant planes equal one plane of ones under the kernels weighted by a: a map of one channel, not k
        axis = self.map.input_axis
        plane = self.map.apply((time_weight.movedim(axis, -1) @ t).unsqueeze(axis), constants[0])[0]
        return Affine(rest, None, plane + self._spread(bias))


AUGMENTED_TIME_LAYERS: dict[str, type[AugmentedTimeConcat] | type[AugmentedTimeHyper]] = {"concat": AugmentedTimeConcat, "hyper": AugmentedTimeHyper, "both": AugmentedTimeBoth}


def check_augmented_time(field: nn.Module, path: TimePath | None) -> None:
    """Check that a field and an augmented time fit together; fields without time layers are not checked.

    Raises:
        ConfigError: for conditioned layers without a path, a path with layers that take t, or two sizes of a.
    """
    for layer in field.modules():
        if not isinstance(layer, TimeLayer):
            continue
        k = layer.augmented_time
        if path is None and k:
            raise ConfigError(f"path=None, but the field takes an augmented time in place of t: give path=TimePath({k})")
        if path is not None and not k:
            raise ConfigError(
                f"path is given, but the field has a {type(layer).__name__} layer, which takes t: build the field with "
                "layer=AugmentedTimeConditioning(...), or leave the path out"
            )
        if path is not None and k != path.k:
            raise ConfigError(f"the field takes an augmented time of size {k}, but the path has size {path.k}")
