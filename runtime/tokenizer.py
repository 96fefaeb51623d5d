"""Text to ids and back: the bundle's tokenizer, whole characters as they come, stop strings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stillgraph.errors import StillgraphError

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are not (yet) a character
CONTEXT = 6  # ids decoded again before new ones: a decoder may treat the start of a text in its own way


class Text:
    """The tokenizer of a bundle, giving the ids that transformers' tokenizer gives.

    Which tokens begin and end a text is tokenizer.json's own rule: beside that file transformers ignores
    `add_bos_token` and `add_eos_token` of tokenizer_config.json (`_from_pretrained`), and so does this.
    special_tokens: names to strings (`bos_token` to `<bos>`), as transformers passes them to chat templates.
    """

    def __init__(self, bundle: Path, bos: int | None = None) -> None:
        """bos: the begin token's id, for its name where there is no tokenizer_config.json.

        Raises StillgraphError where a file cannot be read.
        """
        path = bundle / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a plain Exception
            problem = f"{path} cannot be read ({error})"
            raise StillgraphError("load tokenizer", problem, "export the bundle again") from error
        config = read_json(bundle / "tokenizer_config.json")
        if not config and bos is not None:
            config = {"bos_token": self.tokenizer.id_to_token(bos)}
        self.special_tokens = special_tokens(config)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        known = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        # Those only that are missing: adding one again would take away which spaces beside it are its own.
        self.tokenizer.add_special_tokens(sorted(set(self.special_tokens.values()) - known))
        added = self.tokenizer.get_added_tokens_decoder()
        self.skipped = {key for key, token in added.items() if token.special}
        decoder = self.tokenizer.decoder
        falls_back = decoder is not None and b"ByteFallback" in decoder.__getstate__()  # its JSON
        self.byte_ids = self._byte_ids() if falls_back else frozenset()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`; `special` adds the tokens that begin and end a text."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _byte_ids(self) -> frozenset[int]:
        ids = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(key for key in ids if key is not None)


class Stream:
    """Text of ids that come one by one, in whole characters. The pieces join to the decoded whole.

    A piece is held back while its last character may be unfinished, or while byte tokens run on: a decoder
    with byte fallback reads a run of them as a whole.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._emitted = ""
        self._start = self._read = 0  # the window decoded again, and where its new ids begin

    def push(self, token: int) -> str:
        """The text that `token` completes: maybe empty, maybe of tokens before it too."""
        if token in self._text.skipped:
            return ""
        self._ids.append(token)
        if token in self._text.byte_ids:
            return ""
        whole = self._text.decode(self._ids[self._start :])
        if whole.endswith(UNFINISHED):
            return ""
        piece = whole[len(self._text.decode(self._ids[self._start : self._read])) :]
        self._read = len(self._ids)
        self._start = max(0, self._read - CONTEXT)
        self._emitted += piece
        return piece

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        if self._read == len(self._ids):
            return ""
        return self._text.decode(self._ids)[len(self._emitted) :]


class Stops:
    """Cuts a stream of text before the first stop string.

    stops: some, or one as it is; None for none. Raises StillgraphError for what is no text, or empty.
    """

    def __init__(self, stops: str | Sequence[str] | None) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        if not isinstance(stops, list | tuple | set | frozenset | None):
            problem = f"stop is {stops!r}"
            raise StillgraphError("read stop strings", problem, "give a text or a list of texts")
        for stop in stops or ():
            if not isinstance(stop, str):
                problem = f"a stop string is {stop!r}"
                raise StillgraphError("read stop strings", problem, "give it as text")
            if not stop:
                problem = "a stop string is empty"
                raise StillgraphError("read stop strings", problem, "leave it out or write some text")
        self._stops, self._held = tuple(stops or ()), ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that can go out, whether a stop string was found). Holds back what may begin one."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no such file. Raises StillgraphError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StillgraphError(
            "load bundle", f"{path} is not JSON ({error})", "export the bundle again"
        ) from error
    return value if isinstance(value, dict) else {}


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Names of special tokens to their strings, which tokenizer_config.json has plain or in an object."""
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    return {
        name: token if isinstance(token, str) else str(token["content"])
        for name, token in named.items()
        if isinstance(token, str | dict)
    }
