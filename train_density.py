"""Train a density model: python train_density.py [PRESET] [--options]; --list and --help tell the rest."""

import sys

from cnf.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
