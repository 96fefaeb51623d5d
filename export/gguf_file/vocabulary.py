"""A GGUF's vocabulary as tokenizer.json, its special tokens and its chat template; torch is not needed.

Ids are those of llama.cpp, whose rules are in `llama_vocab::impl::load` of its src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillgraph.exporter.gguf_file.header import Header

ORIGINAL = "export the original checkpoint"
SPACE = "\u2581"  # how a sentencepiece vocabulary writes a space
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # the types of tokens that are matched whole
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CASES = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
TEKKEN = (
    f"{_CASES % ('*', '+')}|{_CASES % ('+', '*')}"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = [BYTES | {"use_regex": True}]
DIGITS = [{"type": "Digits", "individual_digits": True}, *GPT2]


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, BYTES]


@dataclass(frozen=True)
class Cut:
    """How a byte-level vocabulary cuts a text. whole: a word that is a token is not made of merges."""

    steps: list[dict[str, Any]]
    whole: bool = False
    begins: bool = False  # with the begin token, where no key says so


# By tokenizer.ggml.pre. Names that are not here are refused: another cut gives other ids.
CUTS = {
    **dict.fromkeys("llama3 llama-v3 llama-bpe falcon3 pixtral".split(), Cut(_split(LLAMA3), True, True)),
    **dict.fromkeys("smaug-bpe dbrx".split(), Cut(_split(LLAMA3))),
    **dict.fromkeys("qwen2 deepseek-r1-qwen megrez".split(), Cut(_split(QWEN2))),
    **dict.fromkeys("gpt-2 phi-2 olmo mpt".split(), Cut(GPT2)),
    **dict.fromkeys("smollm starcoder refact command-r codeshell".split(), Cut(DIGITS)),
    "tekken": Cut(_split(TEKKEN), True, True),
}
# Tokens that end a text or a turn by their text alone, where no key names them.
ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> <|end_of_text|> <eos>"
    " <\uff5cend\u2581of\u2581sentence\uff5c>"
).split()
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokens, read and checked: `Vocabulary.of` raises StillgraphError."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[list[str]]
    cut: Cut | None  # None: sentencepiece
    ids: dict[str, int]  # bos, eos, unk, pad, where there are such
    stop: list[int]
    begins: bool
    ends: bool
    space_first: bool
    template: str | None

    @classmethod
    def of(cls, header: Header) -> Vocabulary:
        def get(key: str, *kinds: type) -> Any:
            return header.get(f"tokenizer.ggml.{key}", *kinds)

        cut = _cut(header)
        tokens = get("tokens", list) or []
        merges = [_pair(merge) for merge in get("merges", list) or []]
        types, scores = (get(key, list) or [] for key in ("token_type", "scores"))
        for key, found in (("token_type", types), ("merges" if cut else "scores", merges if cut else scores)):
            if not found or (key != "merges" and len(found) != len(tokens)):
                header.refuse(f"tokenizer.ggml.{key} does not fit its {len(tokens)} tokens", ORIGINAL)
        if len(set(tokens)) != len(tokens):
            header.refuse("a token of its vocabulary is there twice", ORIGINAL)
        for key in ("add_sep_token", "remove_extra_whitespaces"):
            if get(key, bool):
                header.refuse(f"tokenizer.ggml.{key} is not supported", ORIGINAL)
        keys = NAMES | {"eot": "eot", "eom": "eom"}
        found = {name: get(f"{key}_token_id", int) for name, key in keys.items()}
        ids = {name: number for name, number in found.items() if number is not None}
        begins = get("add_bos_token", bool)
        made = cls(
            tokens,
            types,
            scores,
            merges,
            cut,
            ids,
            stop=_stop(ids, tokens, types),
            begins=begins if begins is not None else cut is None or cut.begins,
            ends=bool(get("add_eos_token", bool)),
            space_first=cut is None and get("add_space_prefix", bool) is not False,
            template=header.get("tokenizer.chat_template", str),
        )
        made.check(header)
        return made

    def check(self, header: Header) -> None:
        for name, number in self.ids.items():
            if not 0 <= number < len(self.tokens):
                problem = f"special token {name} is {number} and the vocabulary has {len(self.tokens)}"
                header.refuse(problem, "convert the model again")
        for name, wanted in (("bos", self.begins), ("eos", self.ends), ("unk", self.cut is None)):
            if wanted and name not in self.ids:
                key = f"tokenizer.ggml.{NAMES[name]}_token_id"
                header.refuse(f"{key} is missing", "convert the model again")

    def names(self) -> dict[str, str]:
        """Special tokens by transformers' names, as its tokenizer_config.json has them."""
        return {f"{name}_token": self.tokens[self.ids[name]] for name in NAMES if name in self.ids}

    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json."""
        vocab = {token: number for number, token in enumerate(self.tokens)}
        whole = self.cut is not None and self.cut.whole
        model = {"type": "BPE", "vocab": vocab, "merges": self.merges, "ignore_merges": whole}
        if self.cut is None:
            fallback = {"byte_fallback": True, "fuse_unk": True, "unk_token": self.tokens[self.ids["unk"]]}
            model |= fallback | {"merges": merges_of(vocab, self.scores)}
        steps = {"type": "Sequence", "pretokenizers": self.cut.steps} if self.cut else None
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [*self._added()],
            "normalizer": None if self.cut else _sequence("normalizers", self._spaces()),
            "pre_tokenizer": steps,
            "post_processor": self._frame(),
            "decoder": BYTES | {"use_regex": True} if self.cut else _sequence("decoders", self._joins()),
            "model": model,
        }

    def _added(self) -> Any:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if token and kind in (UNKNOWN, CONTROL, USER_DEFINED):
                yield {"id": number, "content": token, **plain, "special": kind != USER_DEFINED}

    def _frame(self) -> dict[str, Any] | None:
        """The tokens that begin and end a text."""
        ends = [name for name, used in (("bos", self.begins), ("eos", self.ends)) if used]
        if not ends:
            return None
        numbers = {self.tokens[self.ids[name]]: self.ids[name] for name in ends}
        known = {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in numbers.items()
        }
        frames = {}
        for key, parts in (("single", "A"), ("pair", "AB")):
            frame: list[dict[str, Any]] = []
            for kind, part in enumerate(parts):
                special = {
                    name: {"SpecialToken": {"id": self.tokens[self.ids[name]], "type_id": kind}}
                    for name in ends
                }
                middle = {"Sequence": {"id": part, "type_id": kind}}
                frame += [*_one(special, "bos"), middle, *_one(special, "eos")]
            frames[key] = frame
        return {"type": "TemplateProcessing", **frames, "special_tokens": known}

    def _spaces(self) -> list[dict[str, Any]]:
        first = [{"type": "Prepend", "prepend": SPACE}] if self.space_first else []
        return [*first, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]

    def _joins(self) -> list[dict[str, Any]]:
        last = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if self.space_first else []
        replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        return [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *last]


def merges_of(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """The pairs of tokens that make a token, those of the highest score first: sentencepiece's order."""
    found = []
    for token, number in vocab.items():
        for at in range(1, len(token)):
            left, right = vocab.get(token[:at]), vocab.get(token[at:])
            if left is not None and right is not None:
                found.append((-scores[number], number, left, right, [token[:at], token[at:]]))
    return [pair for *_, pair in sorted(found)]


def _cut(header: Header) -> Cut | None:
    model = header.get("tokenizer.ggml.model", str)
    if model == "llama":
        return None
    if model != "gpt2":
        header.refuse(f"tokenizer.ggml.model {model!r:.40} is not supported", ORIGINAL)
    pre = header.get("tokenizer.ggml.pre", str)
    if pre not in CUTS:
        header.refuse(f"tokenizer.ggml.pre {pre!r:.40} is not supported", ORIGINAL)
    return CUTS[pre]


def _stop(ids: dict[str, int], tokens: list[str], types: list[int]) -> list[int]:
    """Ids that end a text: those that a key names, then those known by their text."""
    keyed = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    told = [n for n, token in enumerate(tokens) if token in ENDS and types[n] == CONTROL]
    return [*dict.fromkeys([*keyed, *told])]


def _pair(merge: str) -> list[str]:
    at = merge.find(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def _one(parts: dict[str, Any], name: str) -> list[Any]:
    return [parts[name]] if name in parts else []


def _sequence(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}
