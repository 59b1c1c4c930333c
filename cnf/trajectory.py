"""Trajectories of points through the blocks of a flow, and their straightness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from cnf.continuous import CNF
from cnf.errors import ConfigError
from cnf.multiscale import Carried, Multiscale
from cnf.noise import Noise, child
from cnf.transforms import Sequential, Squeeze, Transform

__all__ = ["Straightness", "straightness", "trajectory"]

POINTS = 9  # points on a path, whose length and energy are those of the polygon through them


@torch.no_grad()
def trajectory(
    transform: Transform, x: Tensor, times: Tensor, context: Tensor | None = None, *, noise: Noise | None = None
) -> Tensor:
    """Return the states of x (N, \\*event) at ``times`` in [0, 1], as (len(times), N, \\*event).

    The blocks of the chain divide [0, 1] evenly: of two blocks the first ends at 1/2. Transforms without an ODE
    (Standardize, Logit) take no time, so the path is in the coordinates of the ODE, from the input of the first block
    to the output of the last one.

    Squeezes and splits only permute entries, and every frame has each entry at its place in x: a frame of a multiscale
    flow is a whole image, whose factored-out parts stay fixed while the rest is transformed. The first frame is the
    image, the last one holds the entries of the latent.

    Raises:
        ConfigError: for times outside [0, 1] or decreasing; for a transform without blocks, with blocks nested in
            anything but Sequential, Carried and Multiscale, or with another change of shape between blocks.

    Example:
        >>> from cnf.fields import MLP
        >>> trajectory(CNF(MLP(2)), torch.zeros(5, 2), torch.linspace(0, 1, 3)).shape
        torch.Size([3, 5, 2])
    """
    inside = bool(((times >= 0) & (times <= 1)).all())
    if times.ndim != 1 or len(times) == 0 or not inside or bool((times.diff() < 0).any()):
        raise ConfigError(f"times={times.tolist()}: expected increasing times in [0, 1]")
    walk = _Walk(times, _blocks(transform), context, x.shape[1:])
    walk(transform, x, walk.places, noise)
    if not walk.frames:
        raise ConfigError("a trajectory needs at least one block, but this flow has none")
    return torch.stack(walk.frames)


def _blocks(transform: nn.Module) -> int:
    """Return the number of blocks along the path; a block used twice counts twice."""
    if isinstance(transform, Sequential | Multiscale):
        return sum(map(_blocks, transform.scales if isinstance(transform, Multiscale) else transform.transforms))
    return int(isinstance(transform, CNF))


class _Walk:
    """Forward pass of points through a chain, which records frames.

    ``places`` has the event shape of the current state and holds, for each entry, its index in the flattened frame.
    """

    def __init__(self, times: Tensor, blocks: int, context: Tensor | None, shape: torch.Size):
        self.todo, self.blocks, self.context = times.tolist(), blocks, context
        self.done = 0
        self.frames: list[Tensor] = []
        self.left: list[tuple[Tensor, Tensor]] = []  # factored-out parts and their places
        self._shaped(shape)

    def _shaped(self, shape: torch.Size) -> None:
        self.shape, self.places = shape, torch.arange(shape.numel()).view(shape)

    def __call__(self, transform: Transform, x: Tensor, places: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Apply the transform; return x and its places."""
        if isinstance(transform, Multiscale):
            return self.scales(transform, x, places, noise)
        if isinstance(transform, Sequential):
            return self.chain(transform, x, places, noise)
        if isinstance(transform, CNF):
            return self.block(transform, x, places, transform.start(x), noise)[0], places
        if any(isinstance(m, CNF) for m in transform.modules()):
            raise ConfigError(
                f"a trajectory needs blocks in Sequential, Carried or Multiscale, but this flow has a {type(transform).__name__} "
                "with blocks inside"
            )
        x = transform(x, self.context, noise=noise, log_det=False).value
        if isinstance(transform, Squeeze):
            places = transform(places[None]).value[0]
        elif x.shape[1:] != places.shape:
            if self.done or self.left:
                raise ConfigError(
                    f"a trajectory needs one shape between blocks, but {type(transform).__name__} makes {tuple(x.shape[1:])} of "
                    f"{tuple(places.shape)}, and only Squeeze and Split say where each entry goes"
                )
            self._shaped(x.shape[1:])
            places = self.places
        return x, places

    def chain(self, chain: Sequential, x: Tensor, places: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Apply the transforms first to last, passing on the augmented time that the blocks share, if any."""
        carried = chain if isinstance(chain, Carried) else None
        drive = None if carried is None else carried.start(x, back=False)
        for i, part in enumerate(cast(Iterable[Transform], chain.transforms)):
            if carried is not None and isinstance(part, CNF):
                x, drive = self.block(part, x, places, drive, child(noise, i))
            else:
                x, places = self(part, x, places, child(noise, i))
                drive = None if carried is None else carried.between(part, drive)
        return x, places

    def scales(self, chain: Multiscale, x: Tensor, places: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Apply scale by scale; after all but the last, half of the channels are factored out."""
        first = len(self.left)
        for i, scale in enumerate(cast(Iterable[Transform], chain.scales)):
            x, places = self(scale, x, places, child(noise, i))
            if i + 1 < len(chain.scales):
                x, out = chain.split(x)
                on, gone = chain.split(places[None])
                places = on[0]
                self.left.append((out.flatten(1), gone.flatten()))
        parts = [*self.left[first:], (x.flatten(1), places.flatten())]
        del self.left[first:]
        return torch.cat([part for part, _ in parts], 1), torch.cat([place for _, place in parts])

    def block(
        self, block: CNF, x: Tensor, places: Tensor, drive: Tensor | None, noise: Noise | None
    ) -> tuple[Tensor, Tensor | None]:
        """Integrate one block, recording the frames in its part of [0, 1]; return x and the augmented time."""
        now, end = 0.0, block.end_time(x)
        if noise is None:  # a random layer draws once for the whole path; torch's generator is left as it is
            with torch.random.fork_rng(devices=()):
                noise = Noise(int(torch.randint(2**31, ())))

        def move(until: float) -> None:
            nonlocal x, drive, now
            if until > now:
                x, _, solution = block.integrate(x, (now * end, until * end), self.context, noise=noise, log_det=False, drive=drive)
                drive = None if drive is None else solution.state[1]
                now = until

        while self.todo and self.todo[0] * self.blocks <= self.done + 1 + 1e-9:
            move(min(1.0, max(0.0, self.todo.pop(0) * self.blocks - self.done)))
            self.frames.append(self.frame(x, places))
        move(1.0)
        self.done += 1
        return x, drive

    def frame(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the whole frame, every entry at its place."""
        parts = [*self.left, (x.flatten(1), places.flatten())]
        order = torch.cat([place for _, place in parts]).argsort()
        whole: Tensor = torch.cat([part for part, _ in parts], 1)[:, order.to(x.device)].unflatten(1, self.shape)
        return whole


class Straightness(NamedTuple):
    """Straightness of paths, averaged over the points."""

    ratio: float
    """Distance between the endpoints over the length of the path: 1 for a straight path."""
    kinetic: float
    """∫ |dx/dt|² over [0, 1], per dimension."""


def straightness(
    transform: Transform, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None
) -> Straightness:
    """Measure the straightness of the paths of x (N, \\*event), on the polygons through nine points of each.

    The points are those of :func:`trajectory`. The ratio does not depend on the speed along the path, the kinetic
    energy does; the polygon slightly underestimates it.

    Raises:
        ConfigError: as :func:`trajectory`.

    Example:
        >>> from cnf.fields import MLP
        >>> found = straightness(CNF(MLP(2, zero_init=True)), torch.zeros(5, 2))
        >>> found.kinetic
        0.0
    """
    moves = trajectory(transform, x, torch.linspace(0, 1, POINTS), context, noise=noise).diff(dim=0).flatten(2)
    lengths = moves.norm(dim=2)
    ends = moves.sum(0).norm(dim=1)
    tiny = torch.finfo(moves.dtype).tiny  # the ratio of a resting point is 1
    ratio = (ends + tiny) / (lengths.sum(0) + tiny)
    energy = lengths.square().sum(0) * (POINTS - 1) / moves.shape[2]
    return Straightness(float(ratio.mean()), float(energy.mean()))
