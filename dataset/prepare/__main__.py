"""Runs the command: python -m dataset.prepare."""

import sys

from dataset.prepare.command import main

if __name__ == "__main__":
    sys.exit(main())
