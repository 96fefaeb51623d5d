"""The edge of every command line of ours: errors become one sentence and an exit code.

0 done, 1 a check failed or something unexpected, 2 wrong use or bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from stillgraph.errors import StillgraphError

EXPORT_EXTRA = frozenset({"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "safetensors"})


def guard(app: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> int:
    """Call `app` with the arguments (None: the process's own) and return the exit code. Never raises.

    `--debug` anywhere before a `--` is taken out; it or STILLGRAPH_DEBUG=1 prints tracebacks.
    """
    args, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        app(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        sentence, code = _told(error, args)
        print(f"error: {sentence}", file=sys.stderr)
        return code
    return 0


def command_of(args: Sequence[str]) -> str | None:
    """The command that the arguments name, or None."""
    return next((arg for arg in args if not arg.startswith("-")), None)


def not_installed(error: ModuleNotFoundError, stage: str) -> StillgraphError | None:
    """A missing library of those that an export needs, as a sentence; None for any other module."""
    if (error.name or "").partition(".")[0] not in EXPORT_EXTRA:
        return None
    return StillgraphError(stage, f"{error.name} is not installed", "pip install 'stillgraph[export]'")


def _told(error: Exception, args: Sequence[str]) -> tuple[str, int]:
    if isinstance(error, ModuleNotFoundError):
        error = not_installed(error, " ".join(["stillgraph", command_of(args) or ""]).strip()) or error
    if isinstance(error, StillgraphError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror}; fix that and run the command again.", 2
    first = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__} ({first}); run again with --debug to see where.", 1


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    end = args.index("--") if "--" in args else len(args)
    options = [arg for arg in args[:end] if arg != "--debug"]
    return options + args[end:], len(options) < end or os.environ.get("STILLGRAPH_DEBUG") == "1"
