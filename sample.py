"""Draw samples from a run folder: python sample.py RUN [-n 64] [--out x.png|.npz|.gif]; see --help."""

import os
import sys

# before torch is imported: busy-waiting threads make a solve many times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cnf.cli import sample_main

if __name__ == "__main__":
    sys.exit(sample_main())
