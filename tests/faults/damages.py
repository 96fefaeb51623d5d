"""A damaged file of a bundle: the load says so, or the answers are right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from stillgraph import load
from tests.faults.outcome import Outcome, Trial, outcome
from tests.faults.subjects import FOLDER, PROMPTS, Answer, answer, expected

PAGE = 4096
ASKED = (2, 3, len(PROMPTS))  # two short prompts and a chat
COUNT = 6


def int4(seed: int, scratch: Path) -> Trial:
    return _trial("int4", seed, scratch)


def fp32(seed: int, scratch: Path) -> Trial:
    return _trial("fp32", seed, scratch)


def _trial(name: str, seed: int, scratch: Path) -> Trial:
    plain = [expected(name)[index][:COUNT] for index in ASKED]
    packed = [expected(name, "compiled")[index][:COUNT] for index in ASKED] if name == "int4" else plain

    def right(bundle: Path) -> bool:
        with load(bundle, threads=1) as engine:
            found: list[Answer] = [answer(engine, index, COUNT) for index in ASKED]
        return found in (plain, packed)  # to the last bit of each log-probability

    return damage_trial(FOLDER / name, right, seed, scratch)


def damage_trial(bundle: Path, right: Callable[[Path], bool], seed: int, scratch: Path) -> Trial:
    """right: whether a bundle, which is a damaged copy of this one, gives the right answers."""
    files = sorted(path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".data"]

    def trial(number: int) -> Outcome:
        random = Random(f"{seed} {bundle.name} {number}")
        # Damage is likeliest in what is large.
        file = random.choice(weights if random.random() < 0.5 else files)
        copy = hard_copy(bundle, scratch / "copy")
        data, how = damaged((copy / file).read_bytes(), random)
        (copy / file).unlink()
        (copy / file).write_bytes(data)
        found = outcome(lambda: right(copy), f"trial {number}, {bundle.name}/{file}, {how}")
        shutil.rmtree(copy)
        return found

    return trial


def hard_copy(bundle: Path, copy: Path) -> Path:
    """The same files under another folder, of which any may be replaced."""
    shutil.copytree(bundle, copy, copy_function=os.link)
    return copy


def damaged(data: bytes, random: Random) -> tuple[bytes, str]:
    """Other bytes than `data`, as a disk, a cable or a hand makes them; what was done."""
    if not data:
        return b"\0", "a byte put into it"
    at = random.randrange(len(data))
    some = random.choice([1, 8, 64, PAGE])
    kind = random.choice(["flip", "flips", "zeros", "noise", "cut", "swap", "insert", "lost"])
    changed = bytearray(data)
    if kind == "flip":
        changed[at] ^= 1 << random.randrange(8)
    elif kind == "flips":
        for place in random.sample(range(len(data)), min(some, len(data))):
            changed[place] ^= 1 << random.randrange(8)
    elif kind == "zeros":
        changed[at : at + some] = bytes(len(changed[at : at + some]))
    elif kind == "noise":
        changed[at : at + some] = random.randbytes(len(changed[at : at + some]))
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = random.randbytes(some)
    elif kind == "lost":  # its length as before
        del changed[at : at + some]
        changed += bytes(len(data) - len(changed))
    elif len(data) > 2 * PAGE:
        first, second = random.sample(range(len(data) // PAGE), 2)
        one, other = (slice(page * PAGE, (page + 1) * PAGE) for page in (first, second))
        changed[one], changed[other] = data[other], data[one]
    if bytes(changed) == data:
        changed[at] ^= 1
    return bytes(changed), f"{kind} at {at}, {some} bytes"
