"""Models of every kind, built from their settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from cnf._utils.errors import ConfigError
from cnf.config import AutoencoderConfig, FlowConfig, SolverConfig
from cnf.config.model import ModelConfig
from cnf.flow import Flow
from cnf.models.autoencoders import build_autoencoder
from cnf.models.flows import build
from cnf.models.predictors import build_predictor
from cnf.neural_ode import Predictor
from cnf.vae import FlowVAE

__all__ = ["Model", "build_model"]

Model = Flow | Predictor | FlowVAE


def build_model(
    model: ModelConfig,
    solver: SolverConfig,
    event_shape: tuple[int, ...],
    *,
    levels: int | None,
    width: int = 0,
    field: Callable[[tuple[int, ...], int], nn.Module] | None = None,
    cells: Sequence[tuple[float, float] | None] | None = None,
) -> Model:
    """Build the flow, predictor or autoencoder of these settings; ``width`` is that of the context, or the number of outputs.

    Args:
        model, solver, event_shape, levels: see :func:`~cnf.models.build`.
        width: size of a flow's context, or number of a predictor's outputs.
        field, cells: of a flow, see :func:`~cnf.models.build`.

    Raises:
        ConfigError: for inconsistent settings, or a custom field of another model than a flow.
    """
    if isinstance(model, FlowConfig):
        return build(model, solver, event_shape, levels=levels, context_dim=width, field=field, cells=cells)
    if field is not None:
        raise ConfigError(f"a custom field is for a density: that of architecture={model.architecture!r} is built from its settings")
    if isinstance(model, AutoencoderConfig):
        return build_autoencoder(model, solver, event_shape, levels=levels)
    return build_predictor(model, solver, event_shape, outputs=width, levels=levels)
