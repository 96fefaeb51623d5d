"""`python -m stillgraph.exporter ...` is `stillgraph export ...`."""

from __future__ import annotations

import sys

from stillgraph.exit_codes import guard
from stillgraph.exporter.cli import app


def main() -> int:
    """Run the command named in the process's arguments; the exit code."""
    arguments = ["export", *sys.argv[1:]]  # the guard names the command in its messages
    return guard(lambda args: app(args=args[1:], prog_name="stillgraph export"), arguments)


if __name__ == "__main__":
    sys.exit(main())
