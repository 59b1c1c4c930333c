"""Custom losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.flow import Flow
from cnf.losses.density import DensityObjective
from cnf.random import Noise, number
from cnf.solvers import Solver, Stats

__all__ = ["CustomLoss", "LossFunction"]

LossFunction = Callable[[Any, Tensor, Tensor | None, Noise | None], Tensor | Mapping[str, Tensor]]
ROWS = 1024  # of a validation batch


class CustomLoss(nn.Module):
    """Objective of a function ``loss(model, x, context, noise)``.

    It returns losses (N,) or a scalar, or a dictionary with ``"loss"`` and other terms to report. Randomness comes from
    ``noise``; torch's global generator is seeded by it too, so that dropout is a function of seed and step. Validation
    is the mean of the loss, and no statistics are fitted but those of a flow.

    Args:
        model: any module.
        function: the loss.

    Raises:
        ConfigError: for a function of other arguments.

    Example:
        >>> objective = CustomLoss(nn.Linear(2, 1), lambda model, x, context, noise: (model(x) - context).square().mean())
        >>> objective(torch.ones(3, 2), torch.ones(3, 1))["loss"].shape
        torch.Size([3])
    """

    metric = "loss"
    unit = metric_unit = ""

    def __init__(self, model: nn.Module, function: LossFunction):
        super().__init__()
        called = function.forward if isinstance(function, nn.Module) else function
        try:
            inspect.signature(called).bind(model, None, None, None)
        except ValueError:  # a built-in function has no signature
            pass
        except TypeError:
            name = getattr(function, "__name__", type(function).__name__)
            raise ConfigError(f"loss={name} takes {inspect.signature(called)}, expected a function of (model, x, context, noise)") from None
        self.model, self.function = model, function
        self._density = DensityObjective(model) if isinstance(model, Flow) else None

    @property
    def per_dim_unit(self) -> str:
        """Unit of :meth:`solver_error`: that of a flow's likelihood."""
        return "" if self._density is None else self._density.per_dim_unit

    @property
    def solves(self) -> bool:
        """Whether the model is a flow with blocks, whose training solver can be monitored."""
        return isinstance(self.model, Flow) and bool(self.model.blocks)

    def prepare(self, x: Tensor) -> None:
        """Fit the statistics of a flow."""
        if self._density is not None:
            self._density.prepare(x)

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """Return the terms (see :meth:`forward`) and empty solver statistics.

        Raises:
            ConfigError: for a result that is no loss.
        """
        terms = self._terms(self.model, x, context, noise)
        if torch.is_grad_enabled() and not terms["loss"].requires_grad:
            raise ConfigError("loss does not depend on the parameters: compute it from the model's outputs, without detach or no_grad")
        return terms, Stats()

    def _terms(self, model: nn.Module, x: Tensor, context: Tensor | None, noise: Noise | None) -> dict[str, Tensor]:
        if noise is not None:
            torch.manual_seed(int(number(noise, "loss") * 2**53))
        result = self.function(model, x, context, noise)
        terms = dict(result) if isinstance(result, Mapping) else {"loss": result}
        if not isinstance(terms.get("loss"), Tensor):
            raise ConfigError(f"loss returned {type(result).__name__}; expected a tensor (N,) or (), or a dict with 'loss'")
        for name, value in terms.items():
            if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(x))):
                raise ConfigError(f"loss: {name!r} has shape {tuple(value.shape)}; expected () or ({len(x)},), one for each row")
        return {name: value.expand(len(x)) if value.ndim == 0 else value for name, value in terms.items()}

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return ``loss`` (N,) and other reported terms by name."""
        return self.evaluate(x, context, noise)[0]

    def validate(
        self, model: nn.Module, x: Tensor, context: Tensor | None = None, *, index: Tensor, seed: int, group: Group = SINGLE_PROCESS
    ) -> dict[str, float]:
        """Return the mean of every term; that of the loss is ``validation``."""
        sums: dict[str, float] = {}
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            noise = Noise(seed, "validation", start)
            with torch.enable_grad():  # a loss may take derivatives by x
                terms = self._terms(model, x[rows], None if context is None else context[rows], noise)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach().double().sum())
        means = {name: value / len(x) for name, value in sums.items()}
        return {"validation": means.pop("loss"), **{f"validation_{name}": value for name, value in means.items()}}

    def solver_error(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = SINGLE_PROCESS
    ) -> float:
        """Return the error of a flow's likelihood under its training solver."""
        assert self._density is not None
        return self._density.solver_error(x, context, noise, group=group)

    def block_errors(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, whole: bool = False, group: Group = SINGLE_PROCESS
    ) -> list[float]:
        """Return the error due to each block's solver, or to all together."""
        assert self._density is not None
        return self._density.block_errors(x, context, noise, whole=whole, group=group)

    @property
    def solvers(self) -> list[Solver]:
        """The training solver of each block of a flow."""
        return [] if self._density is None else self._density.solvers

    def put_solvers(self, solvers: Any) -> None:
        """Set the training solvers of a flow."""
        if self._density is not None:
            self._density.put_solvers(solvers)
