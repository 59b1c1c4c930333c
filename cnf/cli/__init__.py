"""The command line: train_density.py and sample.py."""

from cnf.cli.sample import sample_main
from cnf.cli.train import train_main

__all__ = ["sample_main", "train_main"]
