"""How a prompt is cut into calls of a prefill: full ones, and no picture in two where it has to come whole.

An input id of a picture is below zero (`stillgraph.vision.features`). Shapes: P tokens of a call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


def begins_picture(input_id: int, image_tokens: int) -> bool:
    """Whether an input id is the first of a picture's `image_tokens`."""
    return input_id < 0 and (-1 - input_id) % image_tokens == 0


def numbered(input_ids: Sequence[int], image_tokens: int) -> list[int]:
    """Of each input id the number of its picture, from 1 on; 0 for text."""
    found, number = list[int](), 0
    for index, input_id in enumerate(input_ids):
        if begins_picture(input_id, image_tokens) or (input_id < 0 and index == 0):
            number += 1
        found.append(number if input_id < 0 else 0)
    return found


def units(input_ids: Sequence[int], image_tokens: int) -> list[int]:
    """Lengths of what must not be cut: a token of text, or a picture of at most `image_tokens`.

    With image_tokens of 1 everything may be cut everywhere.
    """
    found = list[int]()
    for index, input_id in enumerate(input_ids):
        if input_id >= 0 or index == 0 or begins_picture(input_id, image_tokens):
            found.append(1)
        else:
            found[-1] += 1
    return found


def calls(lengths: Sequence[int], size: int) -> int:
    """How many calls of `size` tokens units of these lengths take."""
    count = 0
    while lengths:
        lengths = lengths[fitting(lengths, size) :]
        count += 1
    return count


def fitting(lengths: Sequence[int], size: int) -> int:
    """How many units of these lengths, none of them longer, go into a call of `size` tokens."""
    return bisect_right(list(accumulate(lengths)), size)
