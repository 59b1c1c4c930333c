"""A flow's blocks as one path from data to noise, and their velocity at any time of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from cnf.compilation import compiled
from cnf.continuous import CNF
from cnf.deferral import sent
from cnf.dequantization import TruncatedNormalDequantize, VariationalDequantize
from cnf.errors import ConfigError
from cnf.fields import Schedule
from cnf.fields.custom import prepared
from cnf.flow import Flow
from cnf.noise import Noise, child
from cnf.rhs import field_precision
from cnf.transforms import Transform
from cnf.transforms.base import placed

__all__ = ["GROUPS", "MatchingPath"]

GROUPS = 8  # times in a batch where all rows of one evaluation share their time
INSTEAD = "the presets fm-digits and fm-mnist have one, and so has --architecture stack"


class MatchingPath:
    """The chain of a flow as flow matching sees it: transforms without an ODE, then K blocks on the whole event.

    Block k of K has the stretch [k/K, (k + 1)/K] of the path's time, as long as its own end time says. A field with a
    ``schedule`` says which path it was made for (:class:`~cnf.fields.Schedule`); others are matched on the plain one.

    Args:
        flow: the flow.

    Raises:
        ConfigError: for a chain that has no such path: with a Split, or other transforms between or after the blocks; a learned or
            a random end time; learned dequantisation, which matching does not train.
    """

    def __init__(self, flow: Flow):
        self.flow = flow
        chain = list(placed(flow.transform, None))
        kinds = [isinstance(leaf, CNF) for leaf, _ in chain]
        if True not in kinds or not all(kinds[kinds.index(True) :]):
            other = next((type(m).__name__ for (m, _), block in zip(chain, kinds, strict=True) if not block and _holds(m)), None)
            what = f"a {other}" if other else "transforms between or after its blocks" if True in kinds else "no block"
            raise ConfigError(f"flow matching needs blocks on the whole event, one after another, and this flow has {what}: {INSTEAD}")
        self.blocks = [cast(CNF, leaf) for leaf, _ in chain[kinds.index(True) :]]
        self.first = kinds.index(True)
        if any(block.learn_end_time or block.steer for block in self.blocks):
            raise ConfigError("flow matching says when a path is at its end, and this flow's end time is learned or random: leave "
                              "--learn-end-time and --steer out")  # fmt: skip
        if any(isinstance(leaf, VariationalDequantize) for leaf, _ in chain):
            raise ConfigError("flow matching trains the field alone, and --dequantize variational is learned too: take uniform, or "
                              "truncated-normal")  # fmt: skip
        schedules = {getattr(block.field, "schedule", Schedule()) for block in self.blocks}
        if len(schedules) > 1 or (len(self.blocks) > 1 and next(iter(schedules)).noise):
            raise ConfigError(f"blocks with schedules {sorted(map(repr, schedules))}: a path with noise has one block")
        (self.schedule,) = schedules

    @property
    def together(self) -> bool:
        """Whether all rows of one evaluation share their time: with an augmented time, weights that depend on t, or a field of one's
        own, which is called with t () (``time_rows = True`` says that it takes (N,))."""
        return any(block.path is not None or not getattr(block.field, "time_rows", False) for block in self.blocks)

    @torch.no_grad()
    def start(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The data (N, \\*event') as they enter the first block, without the schedule's own noise."""
        for leaf, own in list(placed(self.flow.transform, noise))[: self.first]:
            if self.schedule.noise and isinstance(leaf, TruncatedNormalDequantize):
                x = leaf.middle(x)
            else:
                x = leaf(x, noise=own, log_det=False).value
        return x

    def velocity(self, t: Tensor, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """dx/dt (N, \\*event') at the times t (N,) of the whole path, float64 on the CPU, and the points x (N, \\*event');
        ``noise`` is for random layers of a custom field."""
        if len(self.blocks) == 1 and not self.together:
            return self._stretch(0, t, x, context, noise)
        order = t.argsort(stable=True)  # the rows of one block, and of one time, side by side
        there, back = (sent(i, x.device) for i in (order, order.argsort()))
        return self._sorted(t[order], x[there], _given(context, there), noise)[back]

    def _sorted(self, t: Tensor, x: Tensor, context: Tensor | None, noise: Noise | None) -> Tensor:
        """The same for rising times: each block has its stretch of them."""
        parts = []
        count = len(self.blocks)
        bounds = torch.searchsorted(t, torch.arange(1, count, dtype=t.dtype) / count).tolist()
        for k, (first, last) in enumerate(zip([0, *bounds], [*bounds, len(t)], strict=True)):
            if first == last:
                continue
            rows = slice(first, last)
            parts.append(self._stretch(k, t[rows], x[rows], _given(context, rows), child(noise, k)))
        return torch.cat(parts)

    def _stretch(self, k: int, t: Tensor, x: Tensor, context: Tensor | None, noise: Noise | None) -> Tensor:
        """Block k's field in the time of the whole path, at times t (N,) of its stretch; rising, where rows share them."""
        block, count = self.blocks[k], len(self.blocks)
        end = block.end_time(x)
        local = sent((t * count - k).clamp(0, 1).to(x.dtype), x.device) * end
        if self.together:
            lengths = torch.unique_consecutive(t, return_counts=True)[1].tolist()
            found = self._grouped(block, local, lengths, x, context, noise)
        else:
            found = self._evaluated(block, local, x, context, noise)
        return found * (end * count)

    def _grouped(
        self, block: CNF, t: Tensor, lengths: Sequence[int], x: Tensor, context: Tensor | None, noise: Noise | None
    ) -> Tensor:
        """Rows that share their time evaluated together; an augmented time is integrated once, from one to the next."""
        parts = []
        now, drive = torch.zeros_like(t[0]), block.start(x)
        first = 0
        for length in lengths:
            rows = slice(first, first + length)
            time = t[first]
            if drive is not None:
                drive, now = block.carry(drive, time - now), time
                time = drive[0]
            parts.append(self._evaluated(block, time, x[rows], _given(context, rows), child(noise, first)))
            first += length
        return torch.cat(parts)

    def _evaluated(self, block: CNF, t: Tensor, x: Tensor, context: Tensor | None, noise: Noise | None) -> Tensor:
        """The block's field in its training precision, compiled where that is asked for."""
        # several blocks, or rows that share their times, come in other numbers at every step (of a part of a batch), and each number of
        # rows would be compiled anew
        compiles = block.compiles and torch.is_grad_enabled() and len(self.blocks) == 1 and not self.together
        run: Callable[..., Tensor] = compiled(_field, x.is_cuda) if compiles else _field
        with field_precision(block.autocast if block.training else None, x):
            field = prepared(block.field, x, context, noise, t=t)
            return (_field if getattr(field, "random", False) else run)(field, t, x, context).to(x.dtype)


def _field(field: Callable[..., Tensor], t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
    return field(t, x, context)


def _given(context: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """The context of some rows; one for all stays what it is."""
    return context[rows] if context is not None and context.ndim == 2 else context


def _holds(transform: Transform) -> bool:
    """Whether blocks are inside it."""
    return any(isinstance(m, CNF) for m in transform.modules())
