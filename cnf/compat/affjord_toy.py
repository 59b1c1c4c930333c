"""AFFJORD's released 2-D models (2306.02731's code), plain and augmented, as flows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import CheckpointError, ConfigError
from cnf.compat.reading import check_shapes, read_reference
from cnf.fields import TimePath, VectorField
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact
from cnf.solvers import FixedGrid

__all__ = ["SPAN", "ToyField", "ToyPath", "affjord_toy", "load_affjord_toy"]

SPAN = 10.0
"""Integration time from data to noise."""
DIM = 2  # dimension of a point, and of its z* if there is one
BASE_VARIANCE = 0.1
STEPS = 20  # solver steps of the released grid
DEAD = "hyper_net2."  # a second hypernetwork, never called
# our parameter names -> the released ones
NAMES = {f"field.generator.{2 * i}.": f"hyper_net.fc{i + 1}." for i in range(3)}
NAMES |= {f"path.net.{2 * i}.": f"neunet.fc{i + 1}." for i in range(2)}


class ToyField(VectorField):
    """Vector field dx/dt = -mean over m of U_m tanh(W_m y + B_m) with generated W, U and B.

    The augmented field has y = [x, a] and generates from a, the plain one has y = x and generates from time.

    Args:
        augmented: the field takes the augmented time a (2,) in place of t; otherwise it takes t, rounded to float32 as
            in the released code.
        hidden: width of the generator.
        width: number of terms in the mean.

    Example:
        >>> field = ToyField(augmented=True)
        >>> dx, div = field.divergence(torch.rand(2), torch.randn(5, 2))
        >>> dx.shape, div.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    context_dim = 0

    def __init__(self, augmented: bool, hidden: int = 32, width: int = 64):
        super().__init__()
        self.augmented, self.width = augmented, width
        self.seen = 2 * DIM if augmented else DIM
        self.generator = nn.Sequential(
            nn.Linear(DIM if augmented else 1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, (3 * self.seen + 1) * width),
        )

    def _terms(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return W (M, 2) on x, the remaining argument of the tanh (M,), and -U/M (M, 2)."""
        if self.augmented:
            if t.shape != (DIM,):
                raise ConfigError(f"t has shape {tuple(t.shape)}, expected ({DIM},): the augmented field takes a instead of t")
            entering = t
        else:
            entering = (SPAN - t).reshape(1).float().to(t)
        size = self.width * self.seen
        w, u, gate, b = self.generator(entering).split([size, size, size, self.width])
        w, u = (v.reshape(self.width, self.seen) for v in (w, u * torch.sigmoid(gate)))
        shift = b + w[:, DIM:] @ t if self.augmented else b
        return w[:, :DIM], shift, -u[:, :DIM] / self.width

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, 2)."""
        w, shift, u = self._terms(t)
        return torch.tanh(x @ w.T + shift) @ u

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return dx/dt (N, 2) and its exact divergence (N,)."""
        w, shift, u = self._terms(t)
        h = torch.tanh(x @ w.T + shift)
        return h @ u, (1 - h * h) @ (w * u).sum(1)


class ToyPath(TimePath):
    """Augmented time a (1, 2) with a learned initial value at the data: da/dt = -fc2(ELU(fc1 a)).

    Example:
        >>> path = ToyPath()
        >>> path.start(torch.zeros(())).shape, sum(p.numel() for p in path.parameters())
        (torch.Size([1, 2]), 19)
    """

    def __init__(self) -> None:
        super().__init__(DIM, DIM + 1, learn_start=True, nonlinearity="elu")
        nn.init.uniform_(cast(Tensor, self.initial))

    def forward(self, a: Tensor) -> Tensor:
        """Return da/dt (1, 2)."""
        return -super().forward(a)


def affjord_toy(augmented: bool, hidden: int = 32, width: int = 64) -> Flow:
    """Build the released 2-D model: exact trace, base N(0, 0.1 I), 20 solver steps of rk4 (evaluation: dopri5).

    The released models integrate from t = 10 (data) to t = 0 (noise), a :class:`~cnf.CNF` from 0 to 10: its field and
    augmented time are the released ones at 10 - t, with opposite sign.

    Args:
        augmented: build the augmented model, with z*; otherwise the plain one.
        hidden: width of the generator.
        width: number of terms in the field's mean.

    Example:
        >>> flow = affjord_toy(augmented=False)
        >>> sum(p.numel() for p in flow.parameters())
        15904
        >>> flow.log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    block = CNF(
        ToyField(augmented, hidden, width),
        Exact(),
        FixedGrid("rk4", STEPS),
        end_time=SPAN,
        path=ToyPath() if augmented else None,
    )
    return Flow(block, (DIM,), base_std=math.sqrt(BASE_VARIANCE))


def load_affjord_toy(source: str | Path | Mapping[str, Any], seed: Tensor | Sequence[float] | None = None) -> Flow:
    """Load a checkpoint of the released 2-D models as a flow with the same function.

    Args:
        source: a file, its content ``{"func_state_dict": ...}``, or a bare state dict, of either model.
        seed: z* at the data (2,), which the augmented model learns but does not save.

    Returns:
        The flow, in evaluation mode and with the dtype of the weights.

    Raises:
        CheckpointError: for a missing or damaged file, one of another model, or an augmented model without ``seed``.
        ConfigError: for a seed of another shape, or a seed with the plain model.

    Example:
        >>> flow = load_affjord_toy("ckpt.pth", seed=[0.3, 0.8])  # doctest: +SKIP
    """
    state = read_reference(source).state
    augmented = any(name.startswith("neunet.") for name in state)
    hidden, width = _sizes(state, augmented)
    with torch.device("meta"):  # a wrong size must not allocate memory
        shapes = {name: tuple(p.shape) for name, p in _released_parameters(affjord_toy(augmented, hidden, width))}
    check_shapes({name: value for name, value in state.items() if not name.startswith(DEAD)}, shapes)
    if augmented and seed is None:
        raise CheckpointError(f"seed=None, but the augmented example learns z* at the data and does not save it: pass its {DIM} numbers")
    if not augmented and seed is not None:
        raise ConfigError(f"seed={seed}, but this checkpoint is of the plain model, which has no z*: leave seed out")
    flow = affjord_toy(augmented, hidden, width).to(state["hyper_net.fc1.weight"].dtype)
    path = flow.blocks[0].path
    with torch.no_grad():
        for name, parameter in _released_parameters(flow):
            parameter.copy_(state[name])
        if path is not None:
            start, given = cast(Tensor, path.initial), torch.as_tensor(seed)
            if given.shape != start.shape or not given.is_floating_point() or not bool(given.isfinite().all()):
                raise ConfigError(f"seed must be {DIM} finite floats, got {seed}")
            start.copy_(given)
    return flow.eval()


def _sizes(state: Mapping[str, Tensor], augmented: bool) -> tuple[int, int]:
    """Return the generator's width and the number of terms."""
    for name in ("hyper_net.fc1.bias", "hyper_net.fc3.bias"):
        if name not in state:
            raise CheckpointError(f"the checkpoint has no {name}: expected one of AFFJORD's 2-D examples")
    terms = 3 * (2 * DIM if augmented else DIM) + 1
    return state["hyper_net.fc1.bias"].numel(), max(1, state["hyper_net.fc3.bias"].numel() // terms)


def _released_parameters(flow: Flow) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters by released name, without the initial z*."""
    for name, parameter in flow.blocks[0].named_parameters():
        for ours, theirs in NAMES.items():
            if name.startswith(ours):
                yield theirs + name.removeprefix(ours), parameter
