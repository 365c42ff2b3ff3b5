"""The ``pi2`` command."""

from __future__ import annotations

from pi2.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
