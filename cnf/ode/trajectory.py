"""Trajectories of points through the blocks of a flow, and their straightness."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.solvers.base import SolverOverride
from cnf.transforms import Request, Squeeze, Transform, iter_leaves
from cnf.transforms.chain import State, walk

__all__ = ["Straightness", "straightness", "trajectory"]

POINTS = 9  # points on a path, whose length and energy are those of the polygon through them


@torch.no_grad()
def trajectory(
    transform: Transform,
    x: Tensor,
    times: Tensor,
    context: Tensor | None = None,
    *,
    noise: Noise | None = None,
    solver: SolverOverride = None,
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
            anything but a :class:`~cnf.transforms.Chain`, or with another change of shape between blocks.

    Example:
        >>> from cnf.fields import MLP
        >>> trajectory(CNF(MLP(2)), torch.zeros(5, 2), torch.linspace(0, 1, 3)).shape
        torch.Size([3, 5, 2])
    """
    inside = bool(((times >= 0) & (times <= 1)).all())
    if times.ndim != 1 or len(times) == 0 or not inside or bool((times.diff() < 0).any()):
        raise ConfigError(f"times must be increasing in [0, 1], got {times.tolist()}")
    blocks = sum(isinstance(leaf, CNF) for leaf, _ in iter_leaves(transform))
    recorder = _Recorder(times, blocks, x)
    walk(transform, (x, recorder.places), Request(context, noise, log_det=False, solver=solver, steer=False), recorder)
    if not recorder.frames:
        raise ConfigError("a trajectory needs at least one block, but this flow has none: use encode")
    return torch.stack(recorder.frames)


class _Recorder:
    """Visitor of a chain that records frames; the state is x (N, \\*event) and ``places`` (1, \\*event).

    Places are the indices of the entries in the flattened frame ``whole`` (N, D), which keeps entries that are factored out.
    """

    def __init__(self, times: Tensor, blocks: int, x: Tensor):
        self.todo, self.blocks, self.done = times.tolist(), blocks, 0
        self.frames: list[Tensor] = []
        self._begin(x)

    def _begin(self, x: Tensor) -> None:
        """Start frames of the shape of x."""
        self.shape = x.shape[1:]
        self.places = torch.arange(self.shape.numel(), device=x.device).view(1, *self.shape)
        self.whole = x.flatten(1)

    def __call__(self, transform: Transform, state: State, request: Request) -> State:
        """Apply a leaf."""
        x, places = state
        if isinstance(transform, CNF):
            return self.block(transform, x, places, request), places
        if any(isinstance(m, CNF) for m in transform.modules()):
            raise ConfigError(
                f"a trajectory needs blocks in Sequential, SharedAugmentedTime or Multiscale, but this flow has a "
                f"{type(transform).__name__} with blocks inside: make it a Chain"
            )
        x = transform(x, request).value
        if isinstance(transform, Squeeze):
            places = transform(places).value
        elif x.shape[1:] != places.shape[1:]:
            if self.done or places.numel() < self.places.numel():
                raise ConfigError(
                    f"a trajectory needs one shape between blocks, but {type(transform).__name__} makes {tuple(x.shape[1:])} of "
                    f"{tuple(places.shape[1:])}: use only Squeeze and Split there"
                )
            self._begin(x)
            places = self.places
        self.put(x, places)
        return x, places

    def block(self, block: CNF, x: Tensor, places: Tensor, request: Request) -> Tensor:
        """Integrate one block, recording the frames in its part of [0, 1]; return x."""
        now, end, shared = 0.0, block.end_time(x), request.augmented_time
        a = block.initial_augmented_time(x) if shared is None else shared.value
        if request.noise is None:  # a random layer draws once for the whole path; torch's generator is left as it is
            with torch.random.fork_rng(devices=()):
                request = replace(request, noise=Noise(int(torch.randint(2**31, ()))))

        def move(until: float) -> None:
            nonlocal x, a, now
            if until > now:
                x, _, solution = block.integrate(x, (now * end, until * end), request, augmented_time=a)
                a = None if a is None else solution.state[1]
                now = until
                self.put(x, places)

        while self.todo and self.todo[0] * self.blocks <= self.done + 1 + 1e-9:
            move(min(1.0, max(0.0, self.todo.pop(0) * self.blocks - self.done)))
            self.frames.append(self.whole.unflatten(1, self.shape))
        move(1.0)
        self.done += 1
        if shared is not None and a is not None:
            shared.value = a
        return x

    def put(self, x: Tensor, places: Tensor) -> None:
        """Put the entries of x at their places in a new frame."""
        self.whole = self.whole.to(x).index_copy(1, places.flatten(), x.flatten(1))


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
        >>> straightness(CNF(MLP(2, zero_init=True)), torch.zeros(5, 2)).kinetic
        0.0
    """
    moves = trajectory(transform, x, torch.linspace(0, 1, POINTS), context, noise=noise).diff(dim=0).flatten(2)
    lengths = moves.norm(dim=2)
    ends = moves.sum(0).norm(dim=1)
    tiny = torch.finfo(moves.dtype).tiny  # the ratio of a resting point is 1
    ratio = (ends + tiny) / (lengths.sum(0) + tiny)
    energy = lengths.square().sum(0) * (POINTS - 1) / moves.shape[2]
    return Straightness(float(ratio.mean()), float(energy.mean()))
