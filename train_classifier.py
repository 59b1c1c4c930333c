"""Train a predictive model: python train_classifier.py [PRESET] [--options]; see --list and --help."""

import sys

from cnf.cli import classify_main

if __name__ == "__main__":
    sys.exit(classify_main())
