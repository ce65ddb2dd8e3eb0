"""The `kimisys` command, where the trainer's packages may be missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say what to install when it cannot be imported."""
    try:
        from kimisys.trainer import cli
    except ModuleNotFoundError as error:
        sys.exit(f"kimisys needs the trainer's packages ({error}): run `make train` in a clone")
    cli.main()
