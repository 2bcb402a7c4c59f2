"""Runs the command: python -m dataset.verify."""

import sys

from dataset.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
