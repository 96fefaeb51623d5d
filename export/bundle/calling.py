"""The manifest's `calling` block of a checkpoint: tokens, sampling, images, and the rules in words."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import GenerationConfig

from stillgraph.calling import Calling, ImagePreprocessing, PromptCalls, SamplingDefaults, Tokens
from stillgraph.chat_template import read_template
from stillgraph.errors import StillgraphError
from stillgraph.exporter.checkpoint import Checkpoint, quiet_loading
from stillgraph.exporter.checkpoint_folder import NO_CONFIG, STAGE, read_json
from stillgraph.spec import GraphShape, ModelSpec, marks_pictures
from stillgraph.tokenizer import Text
from stillgraph.vision.preprocessor import CONFIG, NESTED, Preprocessor

GENERATION = "generation_config.json"
log = logging.getLogger("stillgraph")
PROBE = "a"  # a prompt, and what a user says in a chat
STATIC = {
    "rows": "No row changes another. Every call feeds every row at least one token: a row with fewer pieces"
    " of a prompt than another is fed its first token at past_length 0 until all have as many left; one"
    " without a text is fed any token.",
    "positions": "Token i of a call is at position past_length + i. No input has positions.",
    "cache": "Before the first call keys and values hold calling.cache.initial. After a call the outputs that"
    " aliases name are inputs of the next one, of either graph; where same_buffer is true both may be one"
    " buffer, else they must not. What lies behind the last valid token is not read and need not be cleared.",
    "next": "Give each chosen token to the decode graph, with past_length the number of tokens fed before it."
    " past_length + 1 must not be over ctx.",
    "graphs": "Of two graphs of one role either serves: they take the same inputs, and the one whose"
    " shape has int8_activations is faster on most CPUs.",
    "session": "Where weights are quantized, ONNX Runtime's session option mlas.disable_kleidiai is to be 1"
    " on Arm, whose kernels else round sums.",
}
CONTINUES = (
    "Cut the prompt into pieces of calling.prompt.chunk tokens, the last maybe shorter, and call the prefill"
    " graph once for each, in order: token_ids is the piece, filled up on the right with the pad token,"
    " valid_length its length, past_length the number of tokens of all pieces before it. The logits of the"
    " last call choose the first new token. A prompt has at most ctx tokens; what fills up the last piece may"
    " reach past that."
)
ONCE = (
    "Call the prefill graph once: token_ids is the prompt, filled up on the right with the pad token,"
    " valid_length its length. Copy the first valid_length slots of its keys and values to the front of the"
    " decode graph's. The logits choose the first new token."
)
GROWING = {
    "prompt": "Call the graph with all tokens of the prompt and keys and values of length 0.",
    "positions": "Token i of a call is at position T + i, of T tokens in the keys and values given to it.",
    "cache": "The outputs named in aliases are the inputs of the next call.",
    "next": "Give each chosen token to the graph in a call of its own.",
}
IMAGES = (
    "Where the prefill takes embeddings, the embed graph makes them of the token_ids; then put the"
    " image_features of each image, in order, into the rows of its image tokens. picture_numbers, where it is"
    " an input, is k for tokens of the k-th image of the call and 0 for others."
)
STOP = "A token of calling.tokens.stop ends the text: it is given out as the last token and has no text."


def calling(checkpoint: Checkpoint, shapes: Iterable[GraphShape], folder: Path | None = None) -> Calling:
    """How these graphs of a checkpoint are called. Raises StillgraphError for files that cannot be used.

    folder: where the bundle's tokenizer is; the checkpoint's where it is not given.
    """
    by_role = {shape.role: shape for shape in shapes}
    prefill = by_role.get("prefill") or by_role.get("dynamic")
    spec = checkpoint.spec
    return Calling(
        tokens=tokens(checkpoint, folder),
        prompt=_prompt(spec, prefill) if prefill else None,
        sampling=sampling(checkpoint.folder),
        images=images(checkpoint.folder) if spec.vision else None,
        rules=_rules(spec, prefill),
    )


def _prompt(spec: ModelSpec, shape: GraphShape) -> PromptCalls:
    return PromptCalls(
        chunk=shape.max_len, continues=shape.ctx is not None, whole_images=marks_pictures(spec, shape)
    )


def _rules(spec: ModelSpec, prefill: GraphShape | None) -> dict[str, str]:
    if prefill is not None and prefill.grows:
        return GROWING | {"stop": STOP}
    rules = {"stop": STOP} if spec.vision is None else {"images": IMAGES, "stop": STOP}
    if prefill is not None:
        rules = {"prompt": CONTINUES if prefill.ctx is not None else ONCE} | rules
    return STATIC | rules


def tokens(checkpoint: Checkpoint, folder: Path | None = None) -> Tokens:
    """Special tokens: of generation_config.json, else as transformers reads the config, else the tokenizer's.

    folder: where the tokenizer is. Raises StillgraphError where they are not numbers of tokens, and warns
    where none ends a text. The pad token is any that is one: no result depends on it.
    """
    folder, vocab = folder or checkpoint.folder, checkpoint.spec.vocab_size
    path = checkpoint.folder / GENERATION
    generation = read_json(path, "download the file again") if path.is_file() else {}
    text = Text(folder) if (folder / "tokenizer.json").is_file() else None
    sources = [generation, _of_config(checkpoint), _of_tokenizer(text)]
    bos = next((given[0] for source in sources if (given := _listed(source, "bos"))), None)
    stop = next((given for source in sources if (given := _listed(source, "eos"))), [])
    pads = [*(pad for source in sources for pad in _listed(source, "pad")), *stop]
    pad = next((pad for pad in pads if _is_token(pad, vocab)), 0)
    values = {"bos": bos, "pad": pad, "stop": stop}
    try:
        made = Tokens.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: special token {first['loc'][0]} is {first['input']!r}: {first['msg']}"
        raise StillgraphError(STAGE, problem, "give it the number of a token") from error
    for name, token in (("bos", made.bos), *(("stop", token) for token in made.stop)):
        if token is not None and token >= vocab:
            problem = f"{path}: special token {name} is {token} and the vocabulary has {vocab}"
            raise StillgraphError(STAGE, problem, "give it the number of a token")
    if not made.stop:
        log.warning("%s names no token that ends a text: it ends by --max-new-tokens or --stop.", path.parent)
    if text is not None and not text.special_tokens and made.bos is not None:
        text = Text(folder, made.bos)
    by_tokenizer, by_template = bos_added(text, folder, made.bos)
    return made.model_copy(update={"tokenizer_adds_bos": by_tokenizer, "template_adds_bos": by_template})


def _listed(source: dict[str, Any], name: str) -> list[Any]:
    """What a source gives as one token, or as several: nothing where it is null or not there."""
    given = source.get(f"{name}_token_id")
    return [] if given is None else given if isinstance(given, list) else [given]


def _is_token(value: object, vocab: int) -> bool:
    return type(value) is int and 0 <= value < vocab


def _of_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers generates with where there is no generation_config.json.

    Of config.json as it is written: a class's own defaults are another model's tokens.
    """
    with quiet_loading():
        raw = read_json(checkpoint.folder / "config.json", NO_CONFIG)
        made: dict[str, Any] = GenerationConfig.from_model_config(raw).to_dict()
    return made


def _of_tokenizer(text: Text | None) -> dict[str, Any]:
    """Ids of the tokens that the tokenizer's config names."""
    if text is None:
        return {}
    return {f"{name}_id": text.tokenizer.token_to_id(token) for name, token in text.special_tokens.items()}


def bos_added(text: Text | None, folder: Path, bos: int | None) -> tuple[bool, bool | None]:
    """Whether tokenizer and chat template begin a text with the begin token, by letting both do so.

    folder: of the template. None for one that is not there, or that refuses the shortest chat.
    """
    if text is None:
        return False, None
    try:
        chat = read_template(folder, text.special_tokens).render([{"role": "user", "content": PROBE}])
    except StillgraphError:
        by_template = None
    else:
        by_template = text.encode(chat, special=False)[:1] == [bos]
    return text.encode(PROBE)[:1] == [bos], by_template


def sampling(folder: Path) -> SamplingDefaults:
    """Of generation_config.json; what it does not say is None. Raises StillgraphError for other values."""
    path = folder / GENERATION
    raw = read_json(path, "download the file again") if path.is_file() else {}
    known: dict[str, Any] = {
        name: raw[name] for name in SamplingDefaults.model_fields if raw.get(name) is not None
    }
    try:
        return SamplingDefaults.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: {first['loc'][0]} is {first['input']!r}: {first['msg']}"
        raise StillgraphError(STAGE, problem, "fix the file") from error


def images(folder: Path) -> ImagePreprocessing | None:
    """Of a preprocessor's config; None where there is none. Raises StillgraphError for steps not known."""
    if not any((folder / name).is_file() for name in (CONFIG, NESTED)):
        return None
    return ImagePreprocessing.model_validate(Preprocessor.read(folder).model_dump())
