"""What to try where batches cannot be used."""

from __future__ import annotations

from cnf.models import SolverConfig
from cnf.presets import TrainConfig

__all__ = ["advice"]


def advice(config: TrainConfig, solver: SolverConfig) -> str:
    """Options that may help, with their present values.

    Example:
        >>> advice(TrainConfig(lr=0.1, warmup=0), SolverConfig(grid_steps=2))
        'a smaller --lr (now 0.1), a longer --warmup (now 0), --kinetic 0.01 or more (now 0), or more --grid-steps (now 2)'
    """
    finer = f"a smaller --rtol (now {solver.rtol:g})" if solver.adaptive else f"more --grid-steps (now {solver.grid_steps})"
    kinetic = f"--kinetic 0.01 or more (now {config.kinetic:g}), " if config.objective == "likelihood" else ""
    return f"a smaller --lr (now {config.lr:g}), a longer --warmup (now {config.warmup}), {kinetic}or {finer}"
