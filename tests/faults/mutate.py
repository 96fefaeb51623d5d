"""Hostile values, and documents of JSON with some in them; a seed gives the same again."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

DEEP = "deep"  # stands for lists in lists, deeper than a parser goes; `text_of` writes them
NUMBERS = (0, -1, 1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, 1e-39, 1e308, float("nan"), float("inf"), -0.0)
TEXTS = (
    "",
    " ",
    "\0",
    "\ud800",
    "a" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "C:\\x",
    "%s%n",
    "{{ 7 }}",
    "nan",
)


def value(random: Random) -> Any:
    """Any value that is none of a kind that one hopes for."""
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return random.choice([None, True, False])
    if kind == 3:
        return [value(random) for _ in range(random.randrange(3))]
    return {str(random.choice(TEXTS)): value(random) for _ in range(random.randrange(3))}


def document(valid: Any, random: Random) -> str:
    """A JSON text near a valid one: one to three places changed, or its text itself."""
    changed = copy.deepcopy(valid)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = list(_places(changed))
        if places:
            _change(*random.choice(places), random)
    text = text_of(changed, random)
    if random.random() < 0.1:
        at = random.randrange(len(text) + 1)
        text = text[:at] + random.choice(["", "\0", "}", '"', "\n", "[" * 200_000]) + text[at + 1 :]
    return text


def text_of(tree: Any, random: Random) -> str:
    depth = random.choice([500, 200_000])
    return json.dumps(tree).replace(json.dumps(DEEP), "[" * depth + "]" * depth)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) of a tree, those near its root as likely as those of its longest list."""
    found, here = [], [tree]
    while here:
        node = here.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        for key in keys if len(keys) <= 12 else [*keys[:6], *keys[-6:]]:
            found.append((node, key))
            if isinstance(node[key], dict | list) and node[key]:
                here.append(node[key])
    return found


def _change(container: Any, key: Any, random: Random) -> None:
    kind = random.randrange(7)
    others = list(container) if isinstance(container, dict) else list(range(len(container)))
    other = random.choice(others)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key], container[other] = container[other], container[key]
    elif kind == 2:
        container[key] = copy.deepcopy(container[other])
    elif kind == 3:
        container[key] = DEEP
    elif kind == 4 and isinstance(container, dict):
        container[str(random.choice(["x", *TEXTS]))] = container.pop(key)
    elif kind == 5 and isinstance(container[key], int | float):
        old = container[key]
        container[key] = random.choice([old + 1, old - 1, -old, old * 2])
    else:
        container[key] = value(random)


def text(valid: str, fragments: tuple[str, ...], random: Random) -> str:
    """A text near a valid one, with fragments put in, pieces cut out, doubled or moved."""
    for _ in range(random.choice([1, 1, 2, 3])):
        at = random.randrange(len(valid) + 1)
        to = min(len(valid), at + random.choice([1, 5, 40]))
        new = random.choice(fragments if random.random() < 0.5 else ["", valid[at:to] * 2])
        valid = valid[:at] + new + valid[random.choice([at, to]) :]
    return valid
