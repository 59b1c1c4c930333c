"""A vector field all of whose weights one small net generates, from t or from an augmented time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.errors import ConfigError
from cnf.fields.augmented import Drive, check_time
from cnf.fields.maps import Linear
from cnf.fields.networks import MLP, Stack
from cnf.fields.time import Affine, Constants, TimeLayer

__all__ = ["Generated", "HyperMLP"]


class Generated(TimeLayer):
    """A layer whose weights are linear in the features of a generator that all layers of a field share.

    W(θ) [x; a] + b(θ); the last layer of a field has no bias, a sigmoid gate on every weight, and takes the mean of its
    inputs: (U σ(G)) h / M.

    Args:
        map: the linear map.
        generator: the net from t (1,), or a[:m], to the features.
        features: its outputs.
        drive: how the augmented time takes t's place; None generates from t.
        first: the field's first layer, which "both" gives a as an input.
        last: the field's last layer.
        context_dim: size of the context; 0 for none.
    """

    time_weights = True

    def __init__(
        self,
        map: Linear,
        generator: nn.Module,
        features: int,
        drive: Drive | None,
        *,
        first: bool,
        last: bool,
        context_dim: int = 0,
    ):
        super().__init__(map, context_dim)
        self.drive, self.last = drive, last
        self.takes_a = drive is not None and drive.kind == "both" and first
        self._generator = (generator,)  # in a tuple: the field registers it, once
        self.numel = map.outputs * (map.inputs + (drive.k if drive is not None and self.takes_a else 0))
        self.head = nn.Linear(features, 2 * self.numel if last else self.numel + map.outputs)

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        if self.drive is not None:
            check_time(t, self.drive, rows=False)
        elif t.ndim:
            raise ConfigError(f"t has shape {tuple(t.shape)}, but a field with generated weights takes a single t ()")
        entering = t.reshape(1) if self.drive is None else t[: self.drive.m]
        flat: Tensor = self.head(self._generator[0](entering))
        weight = flat[: self.numel].reshape(self.map.outputs, -1)
        if self.last:
            weight = weight * torch.sigmoid(flat[self.numel :].reshape(weight.shape)) / self.map.inputs
        shift = None if self.last else flat[self.numel :]
        if self.takes_a:
            weight, driven = self.map.split(weight, self.map.inputs)
            moved = driven @ t
            shift = moved if shift is None else shift + moved
        return Affine(weight, None, shift)


class HyperMLP(MLP):
    r"""An MLP whose weights one net of tanh layers generates: the field of AFFJORD's 2-D densities (2306.02731).

    With one hidden layer, :math:`f = \frac{1}{M} \sum_m u_m\, \sigma(g_m) \tanh(w_m^\top [x, a] + b_m)`, with w, b, u and g
    from the generator. Without a drive the generator takes t and a is absent: the plain net of the paper's comparison.

    Args:
        dim: number of dimensions D of an event.
        hidden: widths M of the hidden layers.
        drive: ``Drive("both")`` for the paper's f([x, a], θ(a)), ``Drive("hyper")`` for f(x, θ(a)), None for f(x, θ(t)).
        generator: widths of the generator's hidden layers.
        nonlinearity: tanh, softplus, elu, swish or relu.
        context_dim: size of the context, which enters every shift; 0 for none.
        residual: ``"none"``, ``"minus"`` or ``"linear"`` (see :class:`~cnf.fields.Stack`).
        zero_init: start as f = 0.

    Raises:
        ConfigError: for sizes below one, no hidden layer in the field or in the generator, or a drive without generator.

    Example:
        >>> sum(p.numel() for p in HyperMLP(2).parameters())
        15904
        >>> field = HyperMLP(2, drive=Drive("both", k=2, m=2))
        >>> dx, div = field.divergence(torch.zeros(2), torch.randn(5, 2))
        >>> dx.shape, div.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64,),
        drive: Drive | None = None,
        generator: Sequence[int] = (32, 32),
        nonlinearity: str = "tanh",
        context_dim: int = 0,
        residual: str = "none",
        zero_init: bool = False,
    ):
        for name, widths in (("hidden", hidden), ("generator", generator)):
            if not widths or any(not isinstance(n, int) or n < 1 for n in widths):
                raise ConfigError(f"{name}={tuple(widths)}: expected one width or more, whole numbers of at least 1")
        if not isinstance(dim, int) or dim < 1:
            raise ConfigError(f"dim={dim}: expected a whole number of at least 1")
        if drive is not None and drive.kind == "concat":
            raise ConfigError("drive='concat' generates no weights, and HyperMLP generates all: use 'both', 'hyper' or None")
        if drive is not None and drive.rank:
            raise ConfigError(f"drive rank={drive.rank}: HyperMLP's generator has no low-rank form; leave it at 0")
        widths = [1 if drive is None else drive.m, *generator]
        net = nn.Sequential()
        for a, b in zip(widths, widths[1:], strict=False):
            net.extend([nn.Linear(a, b), nn.Tanh()])
        sizes = [dim, *hidden, dim]
        last = len(sizes) - 2
        layers = [
            Generated(Linear(a, b), net, widths[-1], drive, first=i == 0, last=i == last, context_dim=context_dim)
            for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        ]
        Stack.__init__(self, layers, nonlinearity, residual)
        self.generator = net
        self.dim = dim
        if zero_init:
            self.zero_()
