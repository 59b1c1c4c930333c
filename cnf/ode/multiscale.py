"""Multiscale architecture of Real NVP, FFJORD and RNODE, which factors out half of the channels at every scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from cnf._utils.aliases import aliases
from cnf._utils.errors import ConfigError, DataError, require_at_least
from cnf.ode.continuous import CNF
from cnf.transforms import Chain, Request, Sequential, Squeeze, Transform
from cnf.transforms.chain import State, Visit
from cnf.transforms.request import AugmentedTime

__all__ = ["Multiscale", "SharedAugmentedTime", "Split", "multiscale", "scale_shapes"]

__getattr__ = aliases(__name__, Carried="SharedAugmentedTime")

Shape = tuple[int, ...]
SMALLEST = 4  # smallest height or width at which the published architecture adds a scale


class Split(nn.Module):
    """Channel split: the first half continues, the second half is factored out (Real NVP, 1605.08803).

    Squeezed channels are input-channel-major: of one squeezed channel, the upper row of every 2x2 square continues; of
    three colours, red and the upper row of green.

    Raises:
        DataError: for an odd number of channels, or (``inverse``) halves of different shapes.

    Example:
        >>> on, out = Split()(torch.arange(4.0).reshape(1, 4, 1, 1))
        >>> on.flatten(), out.flatten()
        (tensor([0., 1.]), tensor([2., 3.]))
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split (\\*lead, 2C, H, W) into the continuing and the factored-out half, (\\*lead, C, H, W) each."""
        if x.ndim < 4 or x.shape[-3] % 2:
            raise DataError(f"x has shape {tuple(x.shape)}, expected (N, C, H, W) with an even number of channels")
        half = x.shape[-3] // 2
        return x[..., :half, :, :], x[..., half:, :, :]

    def inverse(self, on: Tensor, out: Tensor) -> Tensor:
        """Concatenate the two halves."""
        if on.shape != out.shape or on.ndim < 4:
            raise DataError(f"on has shape {tuple(on.shape)} and out {tuple(out.shape)}, expected the same shape (N, C, H, W)")
        return torch.cat([on, out], -3)


def scale_shapes(shape: Shape) -> list[Shape]:
    """Return the input shape of each scale for images (C, H, W): sizes (H, W), (H/2, W/2), ... of at least 4 x 4.

    Raises:
        ConfigError: for an event_shape that is no image, sizes below 4 x 4, or an odd size before a squeeze.

    Example:
        >>> scale_shapes((1, 28, 28))
        [(1, 28, 28), (2, 14, 14), (4, 7, 7)]
    """
    if len(shape) != 3:
        raise ConfigError(f"a multiscale chain takes images (C, H, W), got event_shape {shape}")
    channels, height, width = shape
    if min(height, width) < SMALLEST:
        raise ConfigError(f"images for a multiscale chain must be at least {SMALLEST}x{SMALLEST}, got {height}x{width}: use architecture='stack'")
    count = 0
    while min(height >> count, width >> count) >= SMALLEST:
        count += 1
    unit = 2 ** (count - 1)
    if height % unit or width % unit:
        raise ConfigError(
            f"height and width must be multiples of {unit} to be squeezed {count - 1} times, got {height}x{width}: crop or pad the "
            f"images (such as to {height // unit * unit}x{width // unit * unit}), or use architecture='stack'"
        )
    return [(channels * 2**i, height >> i, width >> i) for i in range(count)]


class SharedAugmentedTime(Sequential):
    """CNF blocks of one scale that share one augmented time a (AFFJORD, 2306.02731, §3.5).

    a is initialised at the first block and passed from each block to the next; a learned initial value is the first
    block's, those of later blocks are removed. The inverse first integrates a forward through all blocks, then x and a
    backward; no state is kept between calls. Transforms between the blocks leave a unchanged.

    Raises:
        ConfigError: without blocks, for a block without augmented time, or for blocks nested in another transform.

    Example:
        >>> from cnf.ode.continuous import CNF
        >>> from cnf.fields import MLP, AugmentedTimeConditioning, TimePath
        >>> block = lambda: CNF(MLP(2, (8,), AugmentedTimeConditioning("concat", k=3)), path=TimePath(3)).eval()
        >>> chain = SharedAugmentedTime([block(), block()])
        >>> x = torch.randn(5, 2)
        >>> bool((chain.inverse(chain(x).value).value - x).abs().max() < 1e-3)
        True
    """

    def __init__(self, transforms: Iterable[Transform]):
        super().__init__(transforms)
        if not self._blocks or any(block.path is None for block in self._blocks):
            raise ConfigError("SharedAugmentedTime takes blocks with an augmented time: build every CNF in it with a path")
        if any(isinstance(m, CNF) for part in self.transforms if not isinstance(part, CNF) for m in part.modules()):
            raise ConfigError("SharedAugmentedTime takes blocks directly, got a transform with blocks inside: pass its blocks instead")
        first = self._blocks[0].path
        for block in self._blocks:
            if block.path is not None and block.path is not first:
                block.path.initial = None

    @property
    def _blocks(self) -> list[CNF]:
        return [part for part in self.transforms if isinstance(part, CNF)]

    def between(self, transform: Transform, a: Tensor) -> Tensor:
        """Return the augmented time after a transform without an ODE."""
        return a

    def through(self, state: State, request: Request, visit: Visit, reverse: bool = False) -> State:
        """Visit the transforms; each block's request holds the augmented time that it continues, and the block updates it."""
        if not state:
            return super().through(state, request, visit, reverse)
        x = state[0]
        steps = [(part, own, self._end(part, x, own)) for part, own in self.steps(request)]
        a = cast(Tensor, self._blocks[0].initial_augmented_time(x))
        entered = []  # augmented time at the end of each step, integrated in advance for the inverse
        for part, own, end in steps if reverse else ():
            a = self.between(part, a) if end is None else cast(CNF, part).advance_augmented_time(a, end, own)
            entered.append(a)
        for part, own, end in reversed(steps) if reverse else steps:
            a = entered.pop() if reverse else a
            if end is None:
                state = visit(part, state, own)
                a = self.between(part, a)
            else:
                shared = AugmentedTime(end, a)
                state = visit(part, state, replace(own, augmented_time=shared))
                a = shared.value
        return state

    @staticmethod
    def _end(part: Transform, x: Tensor, request: Request) -> Tensor | None:
        """Return the end time of a block for this call; None for other transforms."""
        return part.sample_end_time(x, request) if isinstance(part, CNF) else None


class Multiscale(Chain):
    """Sequence of scales with a :class:`Split` in between; z (N, D) concatenates their flattened outputs in order.

    Scale i receives ``noise.child(i)``, hence child j of a ``Sequential`` scale draws from place i/j. Integrals of the
    same name and solver statistics are summed.

    Args:
        scales: one transform per scale; all but the last must output an even number of channels.
        shape: input shape (C, H, W).

    Raises:
        ConfigError: without scales, or for a scale whose output cannot be split.
        DataError: from ``inverse``, for z of another size.

    Example:
        >>> from cnf.transforms import Sequential, Squeeze
        >>> chain = Multiscale([Squeeze(), Sequential([])], (1, 4, 4))
        >>> chain.latent_shape((1, 4, 4)), chain.outputs
        ((16,), [(2, 2, 2), (2, 2, 2)])
        >>> x = torch.randn(3, 1, 4, 4)
        >>> bool((chain.inverse(chain(x).value).value == x).all())
        True
    """

    def __init__(self, scales: Iterable[Transform], shape: Shape):
        super().__init__()
        self.scales = nn.ModuleList(scales)
        self.split = Split()
        self.shape = tuple(shape)
        self.outputs: list[Shape] = []
        if len(self.scales) == 0:
            raise ConfigError("scales is empty, expected at least one transform")
        for i, scale in enumerate(self._scales):
            shape = scale.latent_shape(tuple(shape))
            if i + 1 < len(self.scales):
                if len(shape) != 3 or shape[0] % 2:
                    raise ConfigError(f"scale {i} ends with events of shape {shape}, expected (C, H, W) with an even number of channels")
                shape = (shape[0] // 2, *shape[1:])
            self.outputs.append(shape)

    @property
    def _scales(self) -> list[Transform]:
        return [cast(Transform, scale) for scale in self.scales]

    def latent_shape(self, shape: Shape) -> Shape:
        """Return (D,), the shape of the flat latent."""
        if tuple(shape) != self.shape:
            raise ConfigError(f"this multiscale chain takes events of shape {self.shape}, got {tuple(shape)}")
        return (math.prod(shape),)

    def through(self, state: State, request: Request, visit: Visit, reverse: bool = False) -> State:
        """Visit the scales; ``Split`` divides every entry of the state, (\\*lead, C, H, W), between them."""
        steps = [(scale, request.child(i)) for i, scale in enumerate(self._scales)]
        if reverse:
            return self._back(state, steps, visit)
        done = []
        for i, (scale, own) in enumerate(steps):
            state = out = visit(scale, state, own)
            if i + 1 < len(steps):
                halves = [self.split(entry) for entry in state]
                state, out = tuple(on for on, _ in halves), tuple(gone for _, gone in halves)
            done.append([entry.flatten(-len(self.outputs[i])) for entry in out])
        return tuple(torch.cat(parts, -1) for parts in zip(*done, strict=True))

    def _back(self, state: State, steps: list[tuple[Transform, Request]], visit: Visit) -> State:
        """Visit the scales last to first, from entries (\\*lead, D)."""
        sizes = [math.prod(shape) for shape in self.outputs]
        if state and (state[0].ndim != 2 or state[0].shape[-1] != sum(sizes)):
            raise DataError(f"z has shape {tuple(state[0].shape)}, expected (N, {sum(sizes)}), the scales' concatenated outputs")
        pieces = [entry.split(sizes, -1) for entry in state]
        parts = [tuple(piece[i].unflatten(-1, shape) for piece in pieces) for i, shape in enumerate(self.outputs)]
        state = parts[-1]
        for i, (scale, own) in reversed(list(enumerate(steps))):
            if i + 1 < len(steps):
                state = tuple(self.split.inverse(on, out) for on, out in zip(state, parts[i], strict=True))
            state = visit(scale, state, own)
        return state


def multiscale(shape: Shape, block: Callable[[Shape], Transform], num_blocks: int = 1) -> Multiscale:
    """Build the published multiscale architecture for images (C, H, W) (FFJORD, 1810.01367; RNODE, 2002.02798).

    Every scale but the last is ``num_blocks`` blocks, a squeeze, ``num_blocks`` blocks and a split; the last one is
    ``num_blocks`` blocks. On n scales there are num_blocks (2 n - 1) blocks. Blocks with an augmented time share it
    within each scale (:class:`SharedAugmentedTime`).

    Args:
        shape: (C, H, W).
        block: factory that returns a block for an event_shape.
        num_blocks: blocks in each group.

    Raises:
        ConfigError: for sizes that cannot be halved (see :func:`scale_shapes`), or fewer than one block.

    Example:
        >>> from cnf.ode.continuous import CNF
        >>> from cnf.fields import ConvField
        >>> chain = multiscale((1, 8, 8), lambda shape: CNF(ConvField(shape[0], (4,))))
        >>> chain.outputs, sum(isinstance(m, CNF) for m in chain.modules())
        ([(2, 4, 4), (2, 4, 4)], 3)
    """
    require_at_least(1, num_blocks=num_blocks)
    shapes = scale_shapes(shape)
    scales = []
    for i, entering in enumerate(shapes):
        parts = [block(entering) for _ in range(num_blocks)]
        if i + 1 < len(shapes):
            squeeze = Squeeze()
            squeezed = squeeze.latent_shape(entering)
            parts += [squeeze, *(block(squeezed) for _ in range(num_blocks))]
        scales.append((SharedAugmentedTime if any(isinstance(part, CNF) and part.path is not None for part in parts) else Sequential)(parts))
    return Multiscale(scales, shape)
