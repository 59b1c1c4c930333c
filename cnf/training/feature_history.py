"""Features of fixed points, kept at some steps of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf._utils.errors import SolverError
from cnf.neural_ode import Predictor
from cnf.training.callbacks import Callback, Run

__all__ = ["FeatureHistory", "chosen_points"]

POINTS = 512
NUMBERS = 2**19  # of a frame: 2 MiB in float32, six frames in a checkpoint
SHARES = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0)  # of the steps: features change most at the beginning


def chosen_points(rows: int, size: int) -> Tensor:
    """Return indices of at most 512 random rows, always the same; fewer where their features have many numbers (``size``)."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: max(1, min(POINTS, NUMBERS // size))]


class FeatureHistory(Callback):
    """Features of fixed points at some steps of the training of a predictor (ANODE, 1904.01681, figure 6).

    Args:
        x: points (N, \\*event).
        shares: of the steps, from 0 (the initial weights) to 1, after which features are kept.

    Attributes:
        frames: features (N, \\*state) by step, of the weights that are validated and with the evaluation solver. A step
            whose solve fails is left out.

    Example:
        >>> import cnf
        >>> model, history = cnf.neural_ode.anode_mlp(2, augment=1), FeatureHistory(torch.randn(8, 2))
        >>> x = torch.randn(64, 2)
        >>> result = cnf.fit(model, x, context=x[:, :1], steps=10, callbacks=history, quiet=True)
        >>> list(history.frames), history.frames[10].shape
        ([0, 1, 2, 5, 10], torch.Size([8, 3]))
    """

    def __init__(self, x: Tensor, shares: Sequence[float] = SHARES):
        self.x, self.shares = x, tuple(shares)
        self.frames: dict[int, Tensor] = {}

    def steps(self, run: Run) -> set[int]:
        """Return the steps after which features are kept."""
        return {max(round(share * run.steps), int(share > 0)) for share in self.shares}

    def on_start(self, run: Run) -> None:
        """Keep the features of the initial weights."""
        if run.state.step == 0:
            self._keep(run)

    def on_step(self, run: Run) -> Mapping[str, Any] | None:
        """Keep the features of a chosen step."""
        self._keep(run)
        return None

    @torch.no_grad()
    def _keep(self, run: Run) -> None:
        if run.state.step not in self.steps(run):
            return
        model = run.averaged().eval()
        assert isinstance(model, Predictor)
        try:  # stays on the device: reading it would make the host wait
            self.frames[run.state.step] = model.predict(self.x.to(model.like.device)).features.clone()
        except SolverError:
            self.frames.pop(run.state.step, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the frames."""
        return {"frames": dict(self.frames)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.frames = dict(state["frames"])
