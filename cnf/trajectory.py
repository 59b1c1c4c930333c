"""The paths of points through a chain's blocks, and how straight they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cnf.continuous import CNF
from cnf.errors import ConfigError
from cnf.multiscale import Carried
from cnf.noise import Noise
from cnf.transforms import Transform
from cnf.transforms.base import placed

__all__ = ["Straightness", "straightness", "trajectory"]

POINTS = 9  # of a path, whose length and energy are those of the lines between them


@torch.no_grad()
def trajectory(
    transform: Transform, x: Tensor, times: Tensor, context: Tensor | None = None, *, noise: Noise | None = None
) -> Tensor:
    """Where x (N, \\*event) is at each of ``times`` in [0, 1]: (len(times), N, \\*event).

    The blocks of the chain share [0, 1] evenly: with two blocks the first ends at 1/2. Transforms without time
    (Standardize, Logit) are applied in passing, so the path is drawn where the ODE lives. It starts at what enters the
    first block and ends at what leaves the last one.

    Raises:
        ConfigError: for times outside [0, 1] or decreasing, or a transform that has no such path: one without blocks, or
            one that changes the point's shape on the way (Squeeze between blocks, Split).

    Example:
        >>> from cnf.fields import MLP
        >>> trajectory(CNF(MLP(2)), torch.zeros(5, 2), torch.linspace(0, 1, 3)).shape
        torch.Size([3, 5, 2])
    """
    inside = bool(((times >= 0) & (times <= 1)).all())
    if times.ndim != 1 or len(times) == 0 or not inside or bool((times.diff() < 0).any()):
        raise ConfigError(f"times={times.tolist()}: expected increasing times in [0, 1]")
    chain = list(placed(transform, noise))
    carried = [block for part in transform.modules() if isinstance(part, Carried) for block in part.later]
    drive: Tensor | None = None
    count = sum(isinstance(leaf, CNF) for leaf, _ in chain)
    frames: list[Tensor] = []
    done, todo = 0, times.tolist()
    for leaf, own in chain:
        if not isinstance(leaf, CNF):
            if any(isinstance(m, CNF) for m in leaf.modules()):
                raise ConfigError(f"a trajectory needs a plain chain of blocks, but this flow has a {type(leaf).__name__}")
            x = leaf(x, context, noise=own, log_det=False).value
            continue
        now, end = 0.0, leaf.end_time(x)
        if not any(leaf is block for block in carried):  # the others go on with a where the block before left it
            drive = leaf.start(x)
        while todo and todo[0] * count <= done + 1 + 1e-9:
            local = min(1.0, max(0.0, todo.pop(0) * count - done))
            if local > now:
                x, drive = _moved(leaf, x, (now * end, local * end), context, drive)
                now = local
            frames.append(x)
        if now < 1:
            x, drive = _moved(leaf, x, (now * end, end), context, drive)
        done += 1
    if not frames:
        raise ConfigError("a trajectory needs at least one block, but this flow has none")
    if len({frame.shape for frame in frames}) > 1:
        shapes = sorted({tuple(frame.shape[1:]) for frame in frames})
        raise ConfigError(f"a trajectory needs one shape all along, but this flow's points have the shapes {shapes}")
    return torch.stack(frames)


def _moved(
    block: CNF, x: Tensor, times: tuple[Tensor, Tensor], context: Tensor | None, drive: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The point a frame later, and the augmented time there."""
    x, _, solution = block.integrate(x, times, context, log_det=False, drive=drive)
    return x, None if drive is None else solution.state[1]


class Straightness(NamedTuple):
    """Of the paths of several points, in the mean."""

    ratio: float
    """Distance of the ends over the path's length: 1 where it is straight."""
    kinetic: float
    """∫ |dx/dt|² over [0, 1], per dimension."""


def straightness(
    transform: Transform, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None
) -> Straightness:
    """How straight the paths of x (N, \\*event) are, by the lines between nine of their points, as :func:`trajectory` gives them.

    The ratio does not depend on how fast the path is run through, the kinetic energy does; the lines' is a little too small.

    Raises:
        ConfigError: for a transform that has no such path.

    Example:
        >>> from cnf.fields import MLP
        >>> found = straightness(CNF(MLP(2, zero_init=True)), torch.zeros(5, 2))
        >>> found.kinetic
        0.0
    """
    moves = trajectory(transform, x, torch.linspace(0, 1, POINTS), context, noise=noise).diff(dim=0).flatten(2)
    lengths = moves.norm(dim=2)
    ends = moves.sum(0).norm(dim=1)
    tiny = torch.finfo(moves.dtype).tiny  # where nothing moves the path is straight
    ratio = (ends + tiny) / (lengths.sum(0) + tiny)
    energy = lengths.square().sum(0) * (POINTS - 1) / moves.shape[2]
    return Straightness(float(ratio.mean()), float(energy.mean()))
