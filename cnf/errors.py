"""Exceptions that ``cnf`` raises."""

from cnf._utils.errors import CheckpointError, CNFError, ConfigError, DataError, Interrupted, SolverError, TrainingError

__all__ = ["CNFError", "CheckpointError", "ConfigError", "DataError", "Interrupted", "SolverError", "TrainingError"]
