"""The blocks of a flow as one path from data to noise, and their velocity at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cnf._utils.async_checks import to_device
from cnf._utils.compilation import compiled
from cnf._utils.errors import ConfigError
from cnf._utils.validation import context_rows
from cnf.fields import Interpolant
from cnf.fields.custom import precompute, stated
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.dynamics import field_precision
from cnf.ode.multiscale import Multiscale
from cnf.random import Noise, child
from cnf.transforms import Request, iter_leaves
from cnf.transforms.dequantization import TruncatedNormalDequantize, VariationalDequantize

__all__ = ["GROUPS", "MatchingPath"]

GROUPS = 8  # distinct times in a batch whose evaluations take one time each
INSTEAD = "use --architecture stack, or the preset fm-digits or fm-mnist"


class MatchingPath:
    """The chain of a flow for flow matching: transforms without an ODE, followed by K blocks on the whole event.

    Block k of K covers the path's times [k/K, (k + 1)/K], scaled to its own end time. A field's ``interpolant``
    (:class:`~cnf.fields.Interpolant`) defines the path; fields without one use the plain path.

    Args:
        flow: the flow.

    Raises:
        ConfigError: for a chain with a Split or with transforms between or after the blocks, a learned or random end
            time, learned dequantisation (which matching does not train), blocks with different interpolants, or several
            blocks on a path with noise.
    """

    def __init__(self, flow: Flow):
        self.flow = flow
        chain = [leaf for leaf, _ in iter_leaves(flow.transform)]
        kinds = [isinstance(leaf, CNF) for leaf in chain]
        closed: list[nn.Module] = [m for m in flow.modules() if isinstance(m, Multiscale)]
        closed += [leaf for leaf in chain if _holds(leaf) and not isinstance(leaf, CNF)]
        self.first = kinds.index(True) if True in kinds else 0
        if closed or not all(kinds[self.first :]) or True not in kinds:
            fault = f"a {type(closed[0]).__name__}" if closed else "transforms between or after its blocks" if True in kinds else "no block"
            raise ConfigError(f"flow matching needs consecutive blocks on the whole event, but this flow has {fault}: {INSTEAD}")
        self.blocks = [cast(CNF, leaf) for leaf in chain[self.first :]]
        if any(block.learn_end_time or block.steer for block in self.blocks):
            raise ConfigError(
                "flow matching needs a fixed end time, but this flow's end time is learned or random: leave out --learn-end-time and --steer"
            )
        if any(isinstance(leaf, VariationalDequantize) for leaf in chain):
            raise ConfigError(
                "flow matching trains only the field, but --dequantize variational is learned too: use uniform or truncated-normal"
            )
        interpolants = {stated(block.field, "interpolant") for block in self.blocks}
        if len(interpolants) > 1 or (len(self.blocks) > 1 and next(iter(interpolants)).sigma):
            raise ConfigError(f"a path with noise needs exactly one block, got interpolants {sorted(map(repr, interpolants))}")
        self.interpolant: Interpolant = interpolants.pop()

    @property
    def together(self) -> bool:
        """Whether all rows of one evaluation share their time.

        They do with an augmented time, with weights that depend on t, and for custom fields, which are called with t ()
        unless ``time_rows = True`` declares that they accept (N,).
        """
        return any(block.path is not None or not stated(block.field, "time_rows") for block in self.blocks)

    @torch.no_grad()
    def start(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the data (N, \\*event') at the input of the first block, without the interpolant's noise."""
        for leaf, own in iter_leaves(self.flow.transform, Request(noise=noise, log_det=False))[: self.first]:
            if self.interpolant.sigma and isinstance(leaf, TruncatedNormalDequantize):
                x = leaf.middle(x)
            else:
                x = leaf(x, own).value
        return x

    def velocity(self, t: Tensor, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Return dx/dt (N, \\*event') at the points x (N, \\*event') and the path's times t (N,).

        Times are float64 on the CPU; ``noise`` serves random layers of a custom field.
        """
        if len(self.blocks) == 1 and not self.together:
            return self._stretch(0, t, x, context, noise)
        order = t.argsort(stable=True)  # makes the rows of one block, and of one time, contiguous
        there, back = (to_device(i, x.device) for i in (order, order.argsort()))
        t, x, context = t[order], x[there], context_rows(context, there)
        parts = []
        count = len(self.blocks)
        bounds = torch.searchsorted(t, torch.arange(1, count, dtype=t.dtype) / count).tolist()
        for k, (first, last) in enumerate(zip([0, *bounds], [*bounds, len(t)], strict=True)):
            if first == last:
                continue
            rows = slice(first, last)
            parts.append(self._stretch(k, t[rows], x[rows], context_rows(context, rows), child(noise, k)))
        return torch.cat(parts)[back]

    def _stretch(self, k: int, t: Tensor, x: Tensor, context: Tensor | None, noise: Noise | None) -> Tensor:
        """Return the velocity of block k at the path's times t (N,), ascending where rows share their time."""
        block, count = self.blocks[k], len(self.blocks)
        end = block.end_time(x)
        local = to_device((t * count - k).clamp(0, 1).to(x.dtype), x.device) * end
        if self.together:
            lengths = torch.unique_consecutive(t, return_counts=True)[1].tolist()
            dx = self._grouped(block, local, lengths, x, context, noise)
        else:
            dx = self._evaluated(block, local, x, context, noise)
        return dx * (end * count)

    def _grouped(
        self, block: CNF, t: Tensor, lengths: Sequence[int], x: Tensor, context: Tensor | None, noise: Noise | None
    ) -> Tensor:
        """Evaluate the rows of each time together; an augmented time is integrated once, from one time to the next."""
        parts = []
        now, a = torch.zeros_like(t[0]), block.initial_augmented_time(x)
        first = 0
        for length in lengths:
            rows = slice(first, first + length)
            time = t[first]
            if a is not None:
                a, now = block.advance_augmented_time(a, time - now), time
                time = a[0]
            parts.append(self._evaluated(block, time, x[rows], context_rows(context, rows), child(noise, first)))
            first += length
        return torch.cat(parts)

    def _evaluated(self, block: CNF, t: Tensor, x: Tensor, context: Tensor | None, noise: Noise | None) -> Tensor:
        """Evaluate the block's field in its training precision, compiled if the block is."""
        # with several blocks or shared times the number of rows varies from step to step, and each number would be
        # recompiled
        compiles = block.compiles and torch.is_grad_enabled() and len(self.blocks) == 1 and not self.together
        run: Callable[..., Tensor] = compiled(_field, x.is_cuda) if compiles else _field
        with field_precision(block.autocast if block.training else None, x):
            field = precompute(block.field, x, context, noise, t=t)
            return (_field if field.random else run)(field, t, x, context).to(x.dtype)


def _field(field: Callable[..., Tensor], t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
    return field(t, x, context)


def _holds(transform: nn.Module) -> bool:
    """Return whether the transform contains blocks."""
    return any(isinstance(m, CNF) for m in transform.modules())
