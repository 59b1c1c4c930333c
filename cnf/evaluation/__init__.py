"""Likelihood evaluation: bits/dim or nats of a split, its numerical errors, rankings of rows, and costs of columns."""

from cnf.evaluation.checks import Check, block_errors, check, integral_2d, round_trip_error, solver_error
from cnf.evaluation.columns import Column, column_report, conditional_log_prob, spacing_entropy
from cnf.evaluation.items import ItemNoise
from cnf.evaluation.likeliest import likeliest_values
from cnf.evaluation.likelihood import DEQUANTISATIONS, Evaluation, default_batch_size, evaluate
from cnf.evaluation.ranking import Ranking, rank

__all__ = [
    "DEQUANTISATIONS", "Check", "Column", "Evaluation", "ItemNoise", "Ranking", "block_errors", "check",
    "column_report", "conditional_log_prob", "default_batch_size", "evaluate", "integral_2d", "likeliest_values", "rank",
    "round_trip_error", "solver_error", "spacing_entropy",
]  # fmt: skip
