"""`python -m lightning_muter` is the command `muter`."""

import sys

from lightning_muter.cli import main

if __name__ == "__main__":
    sys.exit(main())
