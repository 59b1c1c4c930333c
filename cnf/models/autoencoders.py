"""Autoencoders built from settings."""

from __future__ import annotations

from cnf._utils.errors import ConfigError
from cnf.config import AutoencoderConfig, FlowPosteriorConfig, PerceptronNetworkConfig, SolverConfig
from cnf.models.solving import autocast, divergence, eval_solver, train_solver
from cnf.vae import FlowVAE, gated_networks, mlp_networks, posterior_flow

__all__ = ["build_autoencoder"]


def build_autoencoder(model: AutoencoderConfig, solver: SolverConfig, event_shape: tuple[int, ...], *, levels: int | None) -> FlowVAE:
    """Build the autoencoder of these settings, for images (C, H, W) of some grey levels.

    Raises:
        ConfigError: for vectors, a size that the networks do not take, or settings without effect.

    Example:
        >>> model = build_autoencoder(AutoencoderConfig.of(latent=4, hidden=(32,)), SolverConfig(), (1, 8, 8), levels=2)
        >>> model.latent, len(model.blocks), model.sample(3).shape
        (4, 1, torch.Size([3, 1, 8, 8]))
    """
    if levels is None:
        raise ConfigError(f"architecture='vae' is for images, and an event is a vector of shape {event_shape}: choose images, or another architecture")
    if isinstance(model.network, PerceptronNetworkConfig):
        encoder, decoder, features = mlp_networks(event_shape, model.latent, model.network.hidden, levels)
    else:
        encoder, decoder, features = gated_networks(event_shape, model.latent, levels)
    flow, width, posterior = None, 0, model.posterior
    if isinstance(posterior, FlowPosteriorConfig):
        rank = getattr(posterior, "rank", 0)
        flow, width = posterior_flow(model.latent, posterior.flow_hidden, rank, posterior.blocks, train_solver(solver), divergence(solver))
    elif solver.precision == "bf16":
        raise ConfigError("precision='bf16' is for the fields of ODEs, and posterior='normal' has none: choose 'fp32'")
    made = FlowVAE(encoder, decoder, model.latent, features, flow, width, levels)
    for block in made.blocks:
        block.eval_solver, block.autocast = eval_solver(solver), autocast(solver)
    made.__dict__["built"] = {
        "model": model, "solver": solver, "event_shape": tuple(event_shape), "levels": levels, "width": 0, "predicts": False,
    }  # fmt: skip
    return made.double() if solver.precision == "fp64" else made
