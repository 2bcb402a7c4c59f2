"""The command line of u-sam.py: its flags, their values and how they go together. No torch here."""
