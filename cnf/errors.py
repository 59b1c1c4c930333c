"""The exceptions that the package raises on purpose; every message says what was wrong and what to try."""

__all__ = ["CNFError", "CheckpointError", "ConfigError", "DataError", "SolverError", "TrainingError"]


class CNFError(Exception):
    """Base of every exception that ``cnf`` raises deliberately."""


class ConfigError(CNFError, ValueError):
    """An argument or option has a value that cannot work."""


class DataError(CNFError, ValueError):
    """A data set, file or batch cannot be used as it is."""


class SolverError(CNFError, RuntimeError):
    """An ODE solve failed: a non-finite state, an underflowing step, or too many steps."""


class CheckpointError(CNFError, RuntimeError):
    """A run folder or a checkpoint cannot be read."""


class TrainingError(CNFError, RuntimeError):
    """Training cannot go on."""
