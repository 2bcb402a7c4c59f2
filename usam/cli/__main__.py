"""Print the page of all flags: python -m usam.cli > docs/flags.md."""

from __future__ import annotations

from usam.cli.page import flags_page

if __name__ == "__main__":
    print(flags_page(), end="")
