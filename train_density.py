"""Train a density model: python train_density.py [PRESET] [--options]; --list and --help tell the rest."""

import os
import sys

# before torch is imported: threads that spin while they wait make a step many times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cnf.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
