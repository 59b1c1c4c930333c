"""Run folders: config.json, trainer.pt (resume state) and model.safetensors (weights), each with a checksum."""

from cnf._utils.aliases import aliases
from cnf.runs.config import FORMAT, RunInfo, config_digest, read_config, write_config
from cnf.runs.files import leftovers, one_line, write_atomic, write_text
from cnf.runs.lock import LOCK, locked, renew
from cnf.runs.model_info import ModelInfo, describe, is_model, read_model_info, write_model_info
from cnf.runs.shelf import PREFIX, located, outputs, pretrained
from cnf.runs.trainer import has_trainer, load_trainer, save_trainer
from cnf.runs.weights import load, save, weights_digest, write_weights

__all__ = [
    "FORMAT", "LOCK", "PREFIX", "ModelInfo", "RunInfo", "config_digest", "describe", "has_trainer", "is_model",
    "leftovers", "load", "load_trainer", "located", "locked", "one_line", "outputs", "pretrained", "read_config",
    "read_model_info", "renew", "save", "save_trainer", "weights_digest", "write_atomic", "write_config",
    "write_model_info", "write_text", "write_weights",
]  # fmt: skip

__getattr__ = aliases(__name__, load_model="load")
