"""Train a density model: python train_density.py [PRESET] [--options]; see --list and --help."""

import os
import sys

# before torch is imported: busy-waiting threads make a step many times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cnf.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
