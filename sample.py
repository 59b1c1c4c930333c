"""Draw samples from a run folder: python sample.py RUN [-n 64] [--out x.png|.npz|.gif]; see --help."""

import sys

from cnf.cli import sample_main

if __name__ == "__main__":
    sys.exit(sample_main())
