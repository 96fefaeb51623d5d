"""What weights are calibrated with, as a command names it: all that can be said of it without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stillgraph.errors import StillgraphError

STAGE = "calibrate"
SAMPLES, NONE = "samples", "none"  # the model's own texts; nothing
LEAST = 4096  # bytes of a file
REMEDY = "name a file of plain text, or leave --calibrate out for the model's own samples"


def calibration_of(option: str) -> str | None:
    """What the manifest says of a `--calibrate`: None for none, `samples`, or the hash of a file.

    Raises StillgraphError for a file that is no text, or too short to say anything.
    """
    if option == NONE:
        return None
    return SAMPLES if option == SAMPLES else hashlib.sha256(_text(option)).hexdigest()


def _text(option: str) -> bytes:
    """The bytes of a file of plain text."""
    try:
        content = Path(option).read_bytes()
    except FileNotFoundError:
        raise StillgraphError(STAGE, f"--calibrate {option}: no such file", REMEDY) from None
    except OSError as error:
        raise StillgraphError(STAGE, f"--calibrate {option}: {error.strerror}", REMEDY) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"--calibrate {option} is no text: byte {error.start} is not UTF-8"
        raise StillgraphError(STAGE, problem, REMEDY) from error
    controls = sum(not (character.isprintable() or character.isspace()) for character in text)
    if controls > len(text) / 100:
        problem = f"--calibrate {option} is no text: {controls} of its {len(text)} characters are unprintable"
        raise StillgraphError(STAGE, problem, REMEDY)
    if len(content) < LEAST:
        problem = f"--calibrate {option} has {len(content)} bytes, and at least {LEAST} are needed"
        raise StillgraphError(STAGE, problem, REMEDY)
    return content
