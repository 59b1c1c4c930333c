"""Command line programs: train_density.py, train_classifier.py and sample.py."""

from cnf.cli.sample import sample_main
from cnf.cli.train import classify_main, train_main

__all__ = ["classify_main", "sample_main", "train_main"]
