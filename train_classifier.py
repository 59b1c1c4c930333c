"""Train a predictive model: python train_classifier.py [PRESET] [--options]; see --list and --help."""

import os
import sys

# before torch is imported: busy-waiting threads make a step many times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cnf.cli import classify_main

if __name__ == "__main__":
    sys.exit(classify_main())
