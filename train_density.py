"""Train a density model: python train_density.py [PRESET] [--options]; see --list and --help."""

import sys

from cnf.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
