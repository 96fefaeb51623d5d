"""A file's text to calibrate with."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from stillgraph.errors import StillgraphError

STAGE = "calibrate"
LEAST = 1024  # tokens


def file_texts(path: Path, tokenizer: Tokenizer, texts: int, length: int) -> Tensor:
    """Ids [at most `texts`, `length`] of pieces evenly over a file, each with the first token of a text.

    Raises StillgraphError for a file of fewer than `LEAST` tokens.
    """
    begin = tokenizer.encode("").ids[:1]
    ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < LEAST:
        problem = f"{path} has {len(ids)} tokens of this model, and a calibration needs {LEAST}"
        raise StillgraphError(STAGE, problem, "give a longer text, or leave --calibrate out")
    own = length - len(begin)
    count = max(1, min(texts, len(ids) // own))
    starts = [round(index * (len(ids) - own) / max(1, count - 1)) for index in range(count)]
    pieces = [begin + ids[start : start + own] for start in starts]
    return torch.tensor(pieces)
