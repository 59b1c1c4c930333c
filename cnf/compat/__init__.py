"""Checkpoints and regularisers of the published codes; no other part of the package imports it."""

from cnf._utils.aliases import aliases
from cnf.compat.affjord_toy import affjord_toy, load_affjord_toy
from cnf.compat.checkpoints import Reference, load_reference, read_reference
from cnf.ode.released import RELEASED, released

__all__ = [
    "RELEASED", "Reference", "affjord_toy", "load_affjord_toy", "load_reference", "read_reference", "released",
]  # fmt: skip

__getattr__ = aliases(__name__, FFJORD_REGULARISERS="RELEASED", RNODE_REGULARISERS="RELEASED")
