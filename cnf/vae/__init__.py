"""Variational autoencoders with a continuous normalizing flow as posterior (FFJORD, 1810.01367)."""

from cnf.vae.model import ELBOTerms, FlowVAE
from cnf.vae.networks import gated_networks, mlp_networks, vae_mlp
from cnf.vae.posterior import posterior_flow

__all__ = ["ELBOTerms", "FlowVAE", "gated_networks", "mlp_networks", "posterior_flow", "vae_mlp"]
