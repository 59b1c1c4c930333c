"""Multiscale architecture of Real NVP, FFJORD and RNODE, which factors out half of the channels at every scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf.continuous import CNF
from cnf.errors import ConfigError, DataError
from cnf.fields.augmented import Handover
from cnf.noise import Noise, child
from cnf.solvers import Stats
from cnf.transforms import Sequential, Squeeze, Transform, Transformed

__all__ = ["Carried", "Multiscale", "Split", "multiscale", "scale_shapes"]

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
        """Split (N, 2C, H, W) into the continuing and the factored-out half, (N, C, H, W) each."""
        if x.ndim != 4 or x.shape[1] % 2:
            raise DataError(f"split halves the channels of (N, C, H, W), but x has shape {tuple(x.shape)}")
        half = x.shape[1] // 2
        return x[:, :half], x[:, half:]

    def inverse(self, on: Tensor, out: Tensor) -> Tensor:
        """Concatenate the two halves."""
        if on.shape != out.shape or on.ndim != 4:
            raise DataError(f"halves of shapes {tuple(on.shape)} and {tuple(out.shape)} do not belong to one split")
        return torch.cat([on, out], 1)


def scale_shapes(shape: Shape) -> list[Shape]:
    """Return the input shape of each scale for images (C, H, W): sizes (H, W), (H/2, W/2), ... of at least 4 x 4.

    Raises:
        ConfigError: for an event_shape that is no image, sizes below 4 x 4, or an odd size before a squeeze.

    Example:
        >>> scale_shapes((1, 28, 28))
        [(1, 28, 28), (2, 14, 14), (4, 7, 7)]
    """
    if len(shape) != 3:
        raise ConfigError(f"a multiscale chain takes images (C, H, W), not events of shape {shape}")
    channels, height, width = shape
    if min(height, width) < SMALLEST:
        raise ConfigError(
            f"images of {height}x{width} are too small for a multiscale chain, which takes at least "
            f"{SMALLEST}x{SMALLEST}: use architecture='stack'"
        )
    count = 0
    while min(height >> count, width >> count) >= SMALLEST:
        count += 1
    unit = 2 ** (count - 1)
    if height % unit or width % unit:
        raise ConfigError(
            f"images of {height}x{width} cannot be squeezed {count - 1} times: expected height and width to be "
            f"multiples of {unit}; crop or pad them (such as to {height // unit * unit}x{width // unit * unit}), or use "
            "architecture='stack'"
        )
    return [(channels * 2**i, height >> i, width >> i) for i in range(count)]


class Carried(Sequential):
    """CNF blocks of one scale that share one augmented time a (AFFJORD, 2306.02731, §3.5).

    a is initialised at the first block and passed from each block to the next; a learned initial value is the first
    block's, those of later blocks are removed. The inverse first integrates a forward through all blocks, then x and a
    backward; no state is kept between calls. Transforms between the blocks leave a unchanged.

    Raises:
        ConfigError: without blocks, for a block without augmented time, or for blocks nested in another transform.

    Example:
        >>> from cnf.continuous import CNF, Handover
        >>> from cnf.fields import MLP, AugmentedTimeConditioning, TimePath
        >>> block = lambda: CNF(MLP(2, (8,), AugmentedTimeConditioning("concat", k=3)), path=TimePath(3)).eval()
        >>> chain = Carried([block(), block()])
        >>> x = torch.randn(5, 2)
        >>> bool((chain.inverse(chain(x).value).value - x).abs().max() < 1e-3)
        True
    """

    def __init__(self, transforms: Iterable[Transform]):
        super().__init__(transforms)
        if not self._blocks or any(block.path is None for block in self._blocks):
            raise ConfigError("a carried chain takes blocks with an augmented time: give every CNF in it a path")
        if any(isinstance(m, CNF) for part in self.transforms if not isinstance(part, CNF) for m in part.modules()):
            raise ConfigError("a carried chain hands its augmented time from block to block: give it no chain with blocks inside")
        for block in self.later:
            if block.path is not None and block.path is not self._blocks[0].path:
                block.path.initial = None

    @property
    def _blocks(self) -> list[CNF]:
        return [part for part in self.transforms if isinstance(part, CNF)]

    @property
    def later(self) -> list[CNF]:
        """Blocks after the first, which continue the augmented time."""
        return [block for block in self._blocks if block is not self._blocks[0]]

    def start(self, x: Tensor, back: bool) -> Tensor | None:
        """Return the augmented time at the beginning of the scale, for the chain's input x."""
        return self._blocks[0].start(x)

    def between(self, transform: Transform, drive: Tensor | None) -> Tensor | None:
        """Return the augmented time after a transform without an ODE."""
        return drive

    def _chain(
        self, x: Tensor, context: Tensor | None, noise: Noise | None, log_det: bool, integrals: bool, back: bool
    ) -> Transformed:
        steps = [(cast(Transform, transform), child(noise, i)) for i, transform in enumerate(self.transforms)]
        ends = [step.drawn_end(x, own) if isinstance(step, CNF) else None for step, own in steps]
        drive = self.start(x, back)
        drives = [drive]  # augmented time at the start of each step, integrated in advance (back) or along with x
        if back:
            for (step, _), end in zip(steps, ends, strict=True):
                assert drive is not None
                drive = self.between(step, drive) if end is None else cast(CNF, step).carry(drive, end)
                drives.append(drive)
        results = []
        for i, (step, own) in reversed(list(enumerate(steps))) if back else enumerate(steps):
            end, here = ends[i], drives[i + back]
            wanted: dict[str, Any] = {"noise": own, "log_det": log_det, "integrals": integrals}
            if end is None:
                one, there = (step.inverse if back else step)(x, context, **wanted), here if back else self.between(step, here)
            elif back:
                one, there = cast(CNF, step).through(x, end, here, context, **wanted, back=True)
            else:
                handover = Handover(end, here)
                one, there = step(x, context, **wanted, handover=handover), handover.drive
            results.append(one)
            drives += [] if back else [there]
            x = one.value
        return _joined(x, results)


class Multiscale(Transform):
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
            raise ConfigError("scales is empty: expected at least one transform")
        for i, scale in enumerate(self._scales):
            shape = scale.latent_shape(tuple(shape))
            if i + 1 < len(self.scales):
                if len(shape) != 3 or shape[0] % 2:
                    raise ConfigError(
                        f"scale {i} leaves events of shape {shape}: a split takes an even number of channels"
                    )
                shape = (shape[0] // 2, *shape[1:])
            self.outputs.append(shape)

    @property
    def _scales(self) -> list[Transform]:
        return [cast(Transform, scale) for scale in self.scales]

    def latent_shape(self, shape: Shape) -> Shape:
        """Return (D,), the shape of the flat latent."""
        if tuple(shape) != self.shape:
            raise ConfigError(f"this multiscale chain was built for events of shape {self.shape}, not {tuple(shape)}")
        return (math.prod(shape),)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Map images (N, C, H, W) to z (N, D)."""
        parts, results = [], []
        for i, scale in enumerate(self._scales):
            results.append(scale(x, context, noise=child(noise, i), log_det=log_det, integrals=integrals))
            x = out = results[-1].value
            if i + 1 < len(self.scales):
                x, out = self.split(x)
            parts.append(out.flatten(1))
        return _joined(torch.cat(parts, 1), results)

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Map z (N, D) to images (N, C, H, W)."""
        sizes = [math.prod(shape) for shape in self.outputs]
        if z.ndim != 2 or z.shape[1] != sum(sizes):
            raise DataError(f"z has shape {tuple(z.shape)}; expected (N, {sum(sizes)}), the scales' outputs one after another")
        parts = [part.unflatten(1, shape) for part, shape in zip(z.split(sizes, 1), self.outputs, strict=True)]
        x, results = parts[-1], []
        for i, scale in reversed(list(enumerate(self._scales))):
            if i + 1 < len(self.scales):
                x = self.split.inverse(x, parts[i])
            results.append(scale.inverse(x, context, noise=child(noise, i), log_det=log_det, integrals=integrals))
            x = results[-1].value
        return _joined(x, results)


def _joined(value: Tensor, results: list[Transformed]) -> Transformed:
    """Sum the log-dets, integrals and solver statistics of the results."""
    total = results[0].log_det
    for result in results[1:]:
        total = total + result.log_det
    sums: dict[str, Tensor] = {}
    for result in results:
        for name, one in result.integrals.items():
            sums[name] = sums[name] + one if name in sums else one
    return Transformed(value, total, sums, sum((result.stats for result in results), Stats()))


def multiscale(shape: Shape, block: Callable[[Shape], Transform], num_blocks: int = 1) -> Multiscale:
    """Build the published multiscale architecture for images (C, H, W) (FFJORD, 1810.01367; RNODE, 2002.02798).

    Every scale but the last is ``num_blocks`` blocks, a squeeze, ``num_blocks`` blocks and a split; the last one is
    ``num_blocks`` blocks. On n scales there are num_blocks (2 n - 1) blocks. Blocks with an augmented time share it
    within each scale (:class:`Carried`).

    Args:
        shape: (C, H, W).
        block: factory that returns a block for an event_shape.
        num_blocks: blocks in each group.

    Raises:
        ConfigError: for sizes that cannot be halved (see :func:`scale_shapes`), or fewer than one block.

    Example:
        >>> from cnf.continuous import CNF, Handover
        >>> from cnf.fields import ConvField
        >>> chain = multiscale((1, 8, 8), lambda shape: CNF(ConvField(shape[0], (4,))))
        >>> chain.outputs, sum(isinstance(m, CNF) for m in chain.modules())
        ([(2, 4, 4), (2, 4, 4)], 3)
    """
    if num_blocks < 1:
        raise ConfigError(f"num_blocks={num_blocks}; expected at least 1 block in each group")
    shapes = scale_shapes(shape)
    scales = []
    for i, entering in enumerate(shapes):
        parts = [block(entering) for _ in range(num_blocks)]
        if i + 1 < len(shapes):
            squeeze = Squeeze()
            squeezed = squeeze.latent_shape(entering)
            parts += [squeeze, *(block(squeezed) for _ in range(num_blocks))]
        scales.append((Carried if any(isinstance(part, CNF) and part.path is not None for part in parts) else Sequential)(parts))
    return Multiscale(scales, shape)
