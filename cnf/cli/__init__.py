"""Command line programs: cnf, and the scripts train_density.py, train_classifier.py and sample.py."""

from cnf.cli.program import classify_main, main, sample_main, train_main

__all__ = ["classify_main", "main", "sample_main", "train_main"]
