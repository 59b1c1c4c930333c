"""Train a model that predicts: python train_classifier.py [PRESET] [--options]; --list and --help tell the rest."""

import os
import sys

# before torch is imported: threads that spin while they wait make a step many times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cnf.cli import classify_main

if __name__ == "__main__":
    sys.exit(classify_main())
