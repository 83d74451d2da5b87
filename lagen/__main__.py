"""``python -m lagen``: the command line."""

from __future__ import annotations

from lagen.cli import main

if __name__ == "__main__":
    main()
