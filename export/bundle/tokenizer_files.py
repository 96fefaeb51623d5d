"""The tokenizer that a bundle ships: transformers' own, as one tokenizer.json, one config, one chat template.

A checkpoint spreads its tokenizer over many files; all merging is done here, and a runtime reads three.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillgraph.chat_template import read_template
from stillgraph.errors import StillgraphError
from stillgraph.exporter.bundle.corpus import CHATS, TEXTS, around
from stillgraph.exporter.checkpoint import quiet_loading
from stillgraph.exporter.checkpoint_folder import read_json
from stillgraph.exporter.config import Say
from stillgraph.tokenizer import Text, special_tokens

STAGE = "read tokenizer"
TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
DOWNLOAD = "download the file again"
# What transformers makes a fast tokenizer of where there is no tokenizer.json.
SOURCES = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model", "spiece.model", "vocab.txt")
KEPT = ("model_max_length", "clean_up_tokenization_spaces", "padding_side")  # of tokenizer_config.json
log = logging.getLogger("stillgraph")


@dataclass(frozen=True)
class Loaded:
    """A folder's tokenizer in transformers. whole: whether tokenizer.json and its label say the same."""

    fast: Any
    whole: bool


def write_tokenizer(source: Path, folder: Path, sees: bool, say: Say) -> None:
    """Write the tokenizer of a checkpoint's folder into a bundle's; a file that already says all is copied.

    sees: whether the model takes pictures; transformers' processor then has the chat template. Raises
    StillgraphError where a tokenizer cannot be read, and where it is not transformers' over the corpus.
    """
    loaded = load(source)
    if loaded is None:
        for name in (CONFIG, TEMPLATE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    say("comparing the tokenizer with transformers'")
    fast, names = loaded.fast, dict(loaded.fast.special_tokens_map)
    merged = not _says_all(source / TOKENIZER, fast.backend_tokenizer)
    if merged:
        (folder / TOKENIZER).write_text(fast.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    else:
        shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    _write_config(source, folder, names, merged or not loaded.whole)
    template = chat_template(source, fast, sees)
    if template is not None:
        (folder / TEMPLATE).write_bytes(template.encode())
    compare(folder, fast, names, template)


def load(source: Path) -> Loaded | None:
    """transformers' tokenizer of a folder; None where it has no file of one. Raises StillgraphError.

    A class that rewrites the pipeline of a byte-level tokenizer.json breaks it: the pieces of such a
    vocabulary are those of its own pre-tokenizer. So does one that makes another kind of model of the
    vocabulary. Then the file is kept, and a warning says so.
    """
    if not (source / TOKENIZER).is_file():
        other = next((name for name in SOURCES if (source / name).is_file()), None)
        return None if other is None else Loaded(_converted(source, other), whole=False)
    try:
        own = _of(PreTrainedTokenizerFast, source)
    except Exception as error:  # tokenizers raises a plain Exception
        problem = f"{source / TOKENIZER} cannot be read ({_line(error)})"
        raise StillgraphError(STAGE, problem, DOWNLOAD) from error
    try:
        made = _of(AutoTokenizer, source)
        label, broken = type(made).__name__, _breaks(own.backend_tokenizer, made.backend_tokenizer)
    except Exception as error:
        log.warning("%s: transformers cannot load it (%s), and the file is kept.", source, _line(error))
        return Loaded(own, whole=False)
    if not broken:
        return Loaded(made, whole=True)
    if text := _first_difference(own, made):
        said = "%s: transformers' %s cuts %s otherwise than tokenizer.json says; the file is kept."
        log.warning(said, source, label, text)
    return Loaded(own, whole=False)


def _of(kind: Any, source: Path) -> Any:
    """A tokenizer by a class of transformers, from the folder alone, running none of its code."""
    with quiet_loading():
        fast = kind.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    fast.backend_tokenizer.no_truncation()
    fast.backend_tokenizer.no_padding()
    return fast


def _converted(source: Path, name: str) -> Any:
    """What transformers makes of the files of a slow tokenizer."""
    remedy = "install what is missing, or save the tokenizer with transformers' save_pretrained"
    try:
        fast = _of(AutoTokenizer, source)
        known = fast.backend_tokenizer.get_vocab()
    except Exception as error:
        problem = f"{source / name} cannot be made a tokenizer.json ({_line(error)})"
        raise StillgraphError(STAGE, problem, remedy) from error
    lost = len(known) <= len(fast.all_special_tokens)
    if name == "vocab.json":
        lost = bool(read_json(source / name, DOWNLOAD).items() - known.items())
    if lost:  # a class that does not look for the file makes a vocabulary of special tokens
        problem = f"{source / name} is not read by transformers' {type(fast).__name__}"
        raise StillgraphError(STAGE, problem, "name its tokenizer_class in tokenizer_config.json")
    return fast


def _breaks(own: Tokenizer, made: Tokenizer) -> bool:
    if type(own.model) is not type(made.model):
        return True
    pipelines = [_pipeline(tokenizer) for tokenizer in (own, made)]
    return pipelines[0] != pipelines[1] and any(b"ByteLevel" in pipeline for pipeline in pipelines)


def _pipeline(tokenizer: Tokenizer) -> bytes:
    """All that cuts a text before the vocabulary is looked at, and joins it after."""
    parts = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder
    return b"|".join(b"" if part is None else part.__getstate__() for part in parts)  # its JSON


def _state(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides on ids. A post-processor that adds nothing is none."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    del state["truncation"], state["padding"]
    if tokenizer.num_special_tokens_to_add(False) == 0:
        del state["post_processor"]
    return state


def _says_all(path: Path, tokenizer: Tokenizer) -> bool:
    return path.is_file() and _state(Tokenizer.from_file(str(path))) == _state(tokenizer)


def _write_config(source: Path, folder: Path, names: dict[str, str], rewritten: bool) -> None:
    """The names of the special tokens, in a file that leads transformers to this tokenizer.json."""
    raw = read_json(source / CONFIG, DOWNLOAD) if (source / CONFIG).is_file() else {}
    if raw and not rewritten and "chat_template" not in raw and special_tokens(raw) == names:
        shutil.copyfile(source / CONFIG, folder / CONFIG)
    elif names or raw:
        kept = {name: raw[name] for name in KEPT if name in raw}
        made = kept | names | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / CONFIG).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def chat_template(source: Path, fast: Any, sees: bool) -> str | None:
    """The template that transformers renders a chat with, where no other is asked for by name.

    chat_template.json is the processor's, whom a model that takes pictures asks first. Raises
    StillgraphError for a file without one.
    """
    own, path = fast.chat_template, source / PROCESSOR_TEMPLATE
    if path.is_file() and (sees or own is None):
        own = read_json(path, DOWNLOAD).get("chat_template")
    if isinstance(own, dict) and "default" not in own:
        log.warning("%s: of several chat templates none is the default, and none is kept.", source)
        return None
    found = own["default"] if isinstance(own, dict) else own
    if not isinstance(found, str | None):
        raise StillgraphError(STAGE, f"{source}: the chat template is {found!r}", "give it as text")
    return found


def chat_ids(folder: Path, bos: int | None, content: str) -> list[int] | None:
    """A chat of one message as a bundle's files make it; None where they have no template, or it refuses."""
    if not (folder / TOKENIZER).is_file():
        return None
    text = Text(folder, bos)
    try:
        chat = read_template(folder, text.special_tokens).render([{"role": "user", "content": content}])
    except StillgraphError:
        return None
    return text.encode(chat, special=False)


def compare(folder: Path, fast: Any, names: dict[str, str], template: str | None) -> None:
    """Raises StillgraphError for the first text or chat of which a bundle's files make another thing than
    transformers' tokenizer."""
    remedy = "report this bug; without the tokenizer's files the export is for token ids alone"
    for _, problem in _compared(folder, fast, names, template):
        if problem is not None:
            raise StillgraphError(STAGE, problem, remedy)


def equal_of_all(source: Path, folder: Path, sees: bool) -> dict[Literal["text", "chat"], list[bool]] | None:
    """Of each text and each chat of the corpus, whether a bundle's files make of it what transformers makes.

    source: the checkpoint's folder; sees: as for `write_tokenizer`. None where there is no tokenizer.
    """
    loaded = load(source)
    if loaded is None:
        return None
    fast, found = loaded.fast, dict[Literal["text", "chat"], list[bool]]()
    template = chat_template(source, fast, sees)
    for kind, problem in _compared(folder, fast, dict(fast.special_tokens_map), template):
        found.setdefault(kind, []).append(problem is None)
    return found


def _compared(
    folder: Path, fast: Any, names: dict[str, str], template: str | None
) -> Iterator[tuple[Literal["text", "chat"], str | None]]:
    """What differs of each chat, and of each text with and without special tokens; None of an equal one."""
    text, rendered = Text(folder), []
    for chat in CHATS if template is not None else ():
        ours, theirs = _ours(folder, names, chat), _theirs(fast, template, chat)
        said = f"the chat template makes {ours!r:.80} of {chat}, and transformers {theirs!r:.80}"
        yield "chat", None if ours == theirs else said
        rendered += [] if ours is None else [ours]
    texts = [*TEXTS, *rendered, *around(fast.get_added_vocab())]
    for special in (True, False):
        for written, expected in zip(texts, _ids(fast, texts, special), strict=True):
            found = text.encode(written, special)
            same = found == expected and text.decode(found) == fast.decode(expected, skip_special_tokens=True)
            said = f"the ids of {written!r:.80} are {found[:20]}, and transformers' {expected[:20]}"
            yield "text", None if same else said


def _ids(fast: Any, texts: list[str], special: bool) -> list[list[int]]:
    ids: list[list[int]] = fast(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _first_difference(own: Any, made: Any) -> str | None:
    """The first text of the corpus that has other ids, shortened."""
    texts = list(TEXTS)
    pairs = zip(_ids(own, texts, False), _ids(made, texts, False), strict=True)
    return next((f"{text!r:.60}" for text, (a, b) in zip(texts, pairs, strict=True) if a != b), None)


def _ours(folder: Path, names: dict[str, str], chat: list[dict[str, str]]) -> str | None:
    try:
        return read_template(folder, names).render(chat)
    except StillgraphError:
        return None


def _theirs(fast: Any, template: str | None, chat: list[dict[str, str]]) -> str | None:
    try:
        rendered: str = fast.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # the template's own refusal, of any kind
        return None
    return rendered


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.160}"
