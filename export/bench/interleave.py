"""The benchmark: contenders made where they are missing, then measured in turns, saved after each run."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.bench.contender import Contender
from stillgraph.exporter.bench.process import Turn, TurnFailed, take_turn
from stillgraph.exporter.bench.report import Result, Setting
from stillgraph.exporter.bench.worker import Request
from stillgraph.exporter.validate.divergences import Statistics
from stillgraph.spec import ModelSpec, VisionSpec

FIRST_ID = 10  # below it lie the special tokens of most vocabularies
BEFORE = 4  # tokens of a prompt before its picture
Say = Callable[[str], None]


@dataclass
class Entry:
    """A contender at a setting, and what is known of it so far; of its quality, or why there is none."""

    contender: Contender
    setting: Setting
    turns: list[Turn] = field(default_factory=list)
    warm: Turn | None = None
    note: str | None = None
    quality: Statistics | str | None = None

    def result(self) -> Result:
        """What the report says of it."""
        found = Result(
            name=self.contender.name,
            label=self.contender.label,
            setting=self.setting,
            exact=self.contender.exact,
            runs=tuple(turn.run for turn in self.turns),
            memory=self.warm.memory if self.warm else None,
            quality=self.quality if isinstance(self.quality, Statistics) else None,
            note=self.note or (self.quality if isinstance(self.quality, str) else None),
        )
        return found.model_copy(update=self.warm.facts if self.warm else {})


def prepare(entries: Sequence[Entry], say: Say) -> None:
    """Make the models that are not there. One that cannot be made gets a note and does not take part."""
    for entry in entries:
        blind = entry.setting.image is not None and not entry.contender.sees
        entry.note = (
            entry.note or entry.contender.missing or ("it is given no pictures here" if blind else None)
        )
        for making in entry.contender.prepare:
            if entry.note is None and not making.path.exists():
                say(f"making {making.path}")
                making.path.parent.mkdir(parents=True, exist_ok=True)
                done = subprocess.run(making.command, capture_output=True, text=True, check=False)
                if done.returncode or not making.path.exists():
                    said = [line.strip(" \u2502") for line in done.stderr.splitlines()]
                    lines = [line for line in said if any(map(str.isalnum, line))] or ["no message"]
                    entry.note = f"it cannot be made: {lines[-1].strip()[:300]}"


def measure(
    entries: Sequence[Entry],
    spec: ModelSpec,
    turns: int,
    patience: float,
    say: Say,
    save: Callable[[], object],
) -> None:
    """Every contender once, uncounted, then `turns` times, in turns A B C A B C. `save` follows each run.

    A contender that fails keeps the runs it has, gets a note, and stops nothing.
    """
    for turn in range(turns + 1):
        for entry in entries:
            if entry.note is not None:
                continue
            label = f"{entry.contender.label}, prompt {entry.setting.prompt_tokens}"
            say(f"turn {turn} of {turns}: {label}" if turn else f"warm-up: {label}")
            try:
                found = take_turn(entry.contender, request(entry, spec), turn, patience)
            except TurnFailed as error:
                entry.note = f"{error} (turn {turn})"
            else:
                if turn == 0:
                    entry.warm = found
                else:
                    entry.turns.append(found)
            save()


def request(entry: Entry, spec: ModelSpec) -> Request:
    setting, contender = entry.setting, entry.contender
    return Request(
        contender.model,
        ids_of(setting, spec),
        setting.new_tokens,
        setting.threads,
        setting.ctx,
        contender.options,
        setting.image,
    )


def ids_of(setting: Setting, spec: ModelSpec) -> list[int]:
    """A prompt's ids; those of a picture, and no others, are image tokens."""
    ids, vision = prompt_ids(setting.prompt_tokens, spec.vocab_size), spec.vision
    if vision is None:
        return ids
    ids = [token if token != vision.image_token else vision.image_token - 1 for token in ids]
    image = [vision.image_token] * (vision.image_tokens if setting.image is not None else 0)
    return [*ids[:BEFORE], *image, *ids[BEFORE + len(image) :]]


def prompt_ids(count: int, vocab: int) -> list[int]:
    """The same ids for everyone, always."""
    source = random.Random(7)
    return [source.randrange(min(FIRST_ID, vocab - 1), vocab) for _ in range(count)]


def sweep(option: str, base: Setting) -> list[Setting]:
    """The settings of `--sweep NAME=VALUE,VALUE`. Raises StillgraphError."""
    names = {"prompt": "prompt_tokens", "new": "new_tokens", "ctx": "ctx", "threads": "threads"}
    name, _, values = option.partition("=")
    try:
        if name not in names:
            raise ValueError
        found = [base.model_copy(update={names[name]: int(value)}) for value in values.split(",")]
        return [Setting.model_validate(setting.model_dump()) for setting in found]
    except ValueError:
        known = ", ".join([*names, "precision"])
        problem = f"--sweep {option!r} is not NAME=VALUE,VALUE with a name of {known}"
        raise StillgraphError("bench", problem, "write for example --sweep prompt=16,128,512") from None


def check(setting: Setting, vision: VisionSpec | None = None) -> None:
    """Refuse a setting that not every contender can do in full. Raises StillgraphError."""
    if setting.image is not None:
        _check_image(setting.image, setting.prompt_tokens, vision)
    wanted = setting.prompt_tokens + setting.new_tokens
    if wanted > setting.ctx + 1:  # the last token is made and not fed
        problem = f"{setting.prompt_tokens} prompt tokens and {setting.new_tokens} new ones are over"
        problem += f" the {setting.ctx} slots of the cache"
        raise StillgraphError("bench", problem, "lower --prompt-tokens or --new-tokens")
    if setting.new_tokens < 2:
        raise StillgraphError("bench", "one new token has no time per token", "give --new-tokens 2 or more")


def _check_image(image: str, prompt_tokens: int, vision: VisionSpec | None) -> None:
    if vision is None:
        problem = f"--image {image} for a model that takes text alone"
        raise StillgraphError("bench", problem, "leave it out")
    if not Path(image).is_file():
        raise StillgraphError("bench", f"--image {image} is not a file", "name a picture")
    if prompt_tokens <= BEFORE + vision.image_tokens:
        problem = f"--prompt-tokens {prompt_tokens} has no room for a picture of {vision.image_tokens} tokens"
        raise StillgraphError("bench", problem, f"give {BEFORE + vision.image_tokens + 1} or more")
