"""Run the program cnf: python -m cnf train | evaluate | rank | sample | compare | sweep | list."""

import sys

from cnf.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
