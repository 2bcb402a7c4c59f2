"""The command line of u-sam.py: flags, their values and checks. Imports no torch."""
