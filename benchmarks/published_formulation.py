"""The computation of the published FFJORD and RNODE image models, written anew on torchdiffeq, as a baseline to time.

It follows facts about those codes, not their text (FFJORD, 1810.01367; RNODE, 2002.02798):

- multiscale chain: logit; blocks; squeeze, blocks, split; ...; blocks. Each block is a network and a solve of its own;
- network: four 3x3 convolutions, the time a plane in front of the channels of each (c + 1, 65, 65, 65 inputs), softplus;
- solve: ``odeint_adjoint`` over the point, its log-density and, in RNODE, two regularisers. FFJORD: dopri5 at 1e-5;
  RNODE: rk4 (the 3/8 rule) with step size 0.25;
- trace: one probe e a solve, eᵀJ by reverse mode with ``create_graph`` at every evaluation. FFJORD: Rademacher; RNODE: Gaussian;
- loss: bits/dim; RNODE adds half the mean of f² and the mean of (eᵀJ)² over a block's dimensions, each times 0.01.

:func:`share_weights` and :func:`replay` make it and a flow of ours one function, so that either can be held against the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.multiscale import Multiscale
from cnf.random import Noise
from cnf.transforms import Sequential

__all__ = [
    "FFJORD",
    "RNODE",
    "Draws",
    "Published",
    "Settings",
    "convolutions",
    "draw",
    "gradient",
    "replay",
    "share_weights",
]

LEVELS = 256
SMALLEST = 4  # height or width below which there is no further scale


@dataclass(frozen=True)
class Settings:
    """What the two published codes do differently."""

    alpha: float
    """Margin of the logit."""
    steps: int = 0
    """Steps of rk4 in each block; 0 for dopri5."""
    tolerance: float = 1e-5
    """dopri5's relative and absolute tolerance."""
    gaussian: bool = False
    """Gaussian probe; Rademacher if not."""
    kinetic: float = 0.0
    """Weight of half the mean of f²."""
    jacobian: float = 0.0
    """Weight of the mean of (eᵀJ)²."""
    blocks: int = 2
    """Blocks before and after every squeeze."""
    hidden: int = 64
    """Channels of the hidden layers."""


FFJORD = Settings(alpha=1e-6)
RNODE = Settings(alpha=1e-5, steps=4, gaussian=True, kinetic=0.01, jacobian=0.01)


class TimeConv(nn.Module):
    """A 3x3 convolution that takes t as a plane in front of the channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs + 1, outputs, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        plane = torch.ones_like(x[:, :1]) * t
        value: Tensor = self.conv(torch.cat([plane, x], 1))
        return value


class Network(nn.Module):
    """f(t, x) of one block: four convolutions, softplus between them."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        sizes = [channels, hidden, hidden, hidden, channels]
        self.layers = nn.ModuleList(TimeConv(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(t, x if i == 0 else F.softplus(x))
        return x


class Dynamics(nn.Module):
    """The right-hand side: f, −eᵀJe and the regularisers' integrands, for the probe that ``probe`` holds during one solve."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        self.network = Network(channels, settings.hidden)
        self.regularised = bool(settings.kinetic or settings.jacobian)
        self.probe: Tensor | None = None
        self.evaluations = 0

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.evaluations += 1
        assert self.probe is not None
        with torch.enable_grad():  # also where nothing is recorded: the trace itself needs it
            x = state[0].requires_grad_(True)
            f = self.network(t, x)
            (pulled,) = torch.autograd.grad(f, x, self.probe, create_graph=True)
            rates = [f, -(pulled * self.probe).flatten(1).sum(1)]
            if self.regularised:
                rates += [0.5 * f.square().flatten(1).mean(1), pulled.square().flatten(1).mean(1)]
        return tuple(rates)


@dataclass
class Draws:
    """The noise of one loss: of the dequantisation (N, C, H, W), and a probe for each block."""

    pixels: Tensor
    probes: list[Tensor]


class Published(nn.Module):
    """The whole model; calling it gives ``loss`` and ``nll``, (N,) in bits/dim.

    Args:
        shape: of the images (C, H, W), with sizes that halve as often as there are scales.
        settings: :data:`FFJORD` or :data:`RNODE`.

    Example:
        >>> sum(p.numel() for p in Published((1, 28, 28), RNODE).parameters())
        800636
    """

    def __init__(self, shape: tuple[int, int, int], settings: Settings):
        super().__init__()
        self.shape, self.settings = shape, settings
        self.scales = [shape]
        while min(self.scales[-1][1:]) // 2 >= SMALLEST:
            c, h, w = self.scales[-1]
            self.scales.append((2 * c, h // 2, w // 2))
        self.blocks = nn.ModuleList(Dynamics(c, settings) for c, _, _ in self.block_shapes())

    def block_shapes(self) -> Iterator[tuple[int, int, int]]:
        """What each block takes, in order."""
        for i, (c, h, w) in enumerate(self.scales):
            yield from [(c, h, w)] * self.settings.blocks
            if i + 1 < len(self.scales):
                yield from [(4 * c, h // 2, w // 2)] * self.settings.blocks

    def forward(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The loss of uint8 images (N, C, H, W)."""
        alpha, like = self.settings.alpha, draws.pixels
        s = alpha + (1 - 2 * alpha) * (images.to(like.dtype) + draws.pixels) / LEVELS
        x = torch.log(s) - torch.log(1 - s)
        # change of log-density, as the codes carry it: log p(x) = log N(z) - change
        change = (torch.log(s) + torch.log(1 - s) - math.log(1 - 2 * alpha)).flatten(1).sum(1)
        penalty = like.new_zeros(len(images))
        blocks, parts, last = iter(zip(self.blocks, draws.probes, strict=True)), [], len(self.scales) - 1
        for i in range(len(self.scales)):
            for group in range(1 if i == last else 2):
                if group:
                    x = F.pixel_unshuffle(x, 2)  # input-channel-major, as the codes squeeze
                for _ in range(self.settings.blocks):
                    x, moved, cost = self._solve(*next(blocks), x)
                    change, penalty = change + moved, penalty + cost
            x, out = (x, x) if i == last else x.chunk(2, 1)
            parts.append(out.flatten(1))
        z = torch.cat(parts, 1)
        log_prob = -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi)) - change
        nll = -(log_prob / z.shape[1] - math.log(LEVELS)) / math.log(2)
        return {"loss": nll + penalty, "nll": nll}

    def _solve(self, dynamics: nn.Module, probe: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(dynamics, Dynamics)
        dynamics.probe, used = probe, self.settings
        flat = x.new_zeros(len(x))
        state = (x, flat, *([flat, flat] if dynamics.regularised else []))
        how = {"method": "rk4", "options": {"step_size": 1 / used.steps}} if used.steps else {"method": "dopri5"}
        path = odeint_adjoint(
            dynamics, state, x.new_tensor([0.0, 1.0]), rtol=used.tolerance, atol=used.tolerance, **how
        )
        ends = [entry[-1] for entry in path]
        cost = used.kinetic * ends[2] + used.jacobian * ends[3] if dynamics.regularised else flat
        return ends[0], ends[1], cost

    def evaluations(self) -> int:
        """Evaluations of all blocks since the last call."""
        total = 0
        for block in self.blocks:
            assert isinstance(block, Dynamics)
            total, block.evaluations = total + block.evaluations, 0
        return total


def draw(model: Published, batch: int, generator: torch.Generator | None = None, like: Tensor | None = None) -> Draws:
    """Fresh noise for one loss, of the type and on the device of ``like`` (or of the weights)."""
    like = next(model.parameters()) if like is None else like
    kind = {"dtype": like.dtype, "device": like.device, "generator": generator}
    # below one, so that no pixel reaches the next grey level by rounding
    pixels = torch.rand(batch, *model.shape, **kind) * (1 - 2**-13)

    def probe(shape: Sequence[int]) -> Tensor:
        e = torch.randn(batch, *shape, **kind)
        return e if model.settings.gaussian else e.sign() + (e == 0)

    return Draws(pixels, [probe(shape) for shape in model.block_shapes()])


def replay(flow: Flow, draws: Draws) -> Noise:
    """The same noise for a flow of ours: its first transform dequantises, its last is the multiscale chain."""
    tensors, probes = {"0/dequantize": draws.pixels}, iter(draws.probes)
    assert isinstance(flow.transform, Sequential)
    for place, part in enumerate(flow.transform.transforms):
        for i, scale in enumerate(part.scales if isinstance(part, Multiscale) else ()):
            for j, block in enumerate(scale.transforms):
                if isinstance(block, CNF):
                    tensors[f"{place}/{i}/{j}/probe"] = next(probes)
    return Noise.replay(tensors)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a flow of ours or of a :class:`Published`, in the order in which they act."""
    blocks = model.blocks if isinstance(model, Flow) else [model]
    return [m for block in blocks for m in block.modules() if isinstance(m, nn.Conv2d)]


def share_weights(flow: Flow, model: Published) -> None:
    """Give ``model`` the weights of a flow of ours: convolution by convolution, in order; both take t as channel 0."""
    with torch.no_grad():
        for mine, other in zip(convolutions(flow), convolutions(model), strict=True):
            other.weight.copy_(mine.weight)
            assert mine.bias is not None and other.bias is not None
            other.bias.copy_(mine.bias)


def gradient(model: nn.Module) -> Tensor:
    """The convolutions' gradients, flattened, in float64 (a learned end time, which the published codes do not train, is left out)."""
    found = [p.grad for conv in convolutions(model) for p in (conv.weight, conv.bias)]
    return torch.cat([torch.zeros(0), *(g.detach().flatten().cpu() for g in found if g is not None)]).double()
