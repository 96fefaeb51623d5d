"""The `stillgraph` command: `run`, `chat`, `serve` and `unpack`, and what other packages add to it.

A package adds a command by an entry point of the group `stillgraph.commands`: its name is the command's, its
object a `typer.Typer` (a group of commands) or a function (one command). Only the one asked for is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated

import typer

from stillgraph.commands import chat, run, unpack
from stillgraph.errors import StillgraphError
from stillgraph.exit_codes import command_of, guard
from stillgraph.serve.command import serve

GROUP = "stillgraph.commands"
HELP = (
    "Static ONNX graphs of a language model: run a bundle, or make one. Results go to stdout, progress "
    "to stderr; exit codes are 0 done, 1 a check failed, 2 wrong use or bad input. --debug anywhere prints "
    "tracebacks."
)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: run the command named in `argv` (None: the process's own); the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that cannot show a character is no reason to stop
    return guard(lambda args: build(args)(args=args, prog_name="stillgraph"), argv)


def build(args: Sequence[str]) -> typer.Typer:
    """The app for these arguments: our commands, and of the others the one named, or all to list them."""
    app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    app.command()(run)
    app.command()(chat)
    app.command()(unpack)
    app.command()(serve)
    named = command_of(args)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name == named:
            _add(app, entry.name, entry.load())
        elif named is None:
            _add(app, entry.name, _loaded_or_stub(entry))
    return app


def _add(app: typer.Typer, name: str, command: object) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    elif callable(command):
        app.command(name)(command)
    else:
        raise StillgraphError(
            f"stillgraph {name}", f"{command!r} is not a command", "install stillgraph again"
        )


def _loaded_or_stub(entry: EntryPoint) -> object:
    """The command, or a stand-in for help to list where what it needs is not installed."""
    try:
        return entry.load()
    except ImportError as error:

        def stub() -> None: ...

        stub.__doc__ = f"Not available: {error}; pip install 'stillgraph\\[export]'."
        return stub


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("stillgraph"))
        raise typer.Exit


def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


if __name__ == "__main__":
    sys.exit(main())
