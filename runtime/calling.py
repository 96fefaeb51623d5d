"""The manifest's `calling` block: what a driver in any language does between the graphs' calls.

Shapes: B rows, P tokens of a call of the prefill, C cache slots.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from stillgraph.spec import Frozen

Number = Annotated[float, Field(allow_inf_nan=False)]
Triple = tuple[Number, Number, Number]


class Tokens(Frozen):
    """Special tokens. bos: begins a text; None where the model has none.

    tokenizer_adds_bos: whether tokenizer.json puts it before a plain prompt that is encoded with special
    tokens. template_adds_bos: whether a chat that the chat template rendered begins with it, so that it is
    encoded without special tokens; None where there is no template, or it refuses a chat of one message. pad:
    fills ids behind the valid ones; no result depends on it. stop: each ends a text. stop_is_given_out:
    whether the one that did is the last of the tokens given out; it is no part of the text.
    """

    bos: NonNegativeInt | None
    tokenizer_adds_bos: bool = False
    template_adds_bos: bool | None = None
    pad: NonNegativeInt = 0
    stop: tuple[NonNegativeInt, ...]
    stop_is_given_out: Literal[True] = True


class PromptCalls(Frozen):
    """How a prompt is cut into calls. chunk: the most tokens of one; each but the last takes as many.

    continues: whether there may be more than one: each gets as past_length the tokens of all before it, 0 the
    first. whole_images: whether the tokens of an image must come in one call, which is cut short for that.
    """

    chunk: PositiveInt
    continues: bool
    whole_images: bool = False


class CacheStart(Frozen):
    """What keys and values are before the first call. finite: what lies in slots that hold nothing, from
    past_length on, is given no weight; it may be any finite number, and need not be cleared."""

    initial: float = 0.0
    finite: Literal[True] = True


class SamplingDefaults(Frozen):
    """How the model's makers choose tokens, from generation_config.json; None where that says nothing.

    do_sample: whether tokens are drawn; else the most likely one is taken, and only the repetition_penalty
    has an effect. That is applied first, to every token of the prompt and after it; then the others, in the
    order of these keys. What a driver does by default is its own choice: ours takes the most likely token.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ImagePreprocessing(Frozen):
    """The steps from a picture to pixels [B, 3, H, W], in this order; None leaves one out.

    convert_rgb: a mode other than RGB is converted (transparency over white), or else refused. size: (height,
    width), or the pixels of the shortest edge; resample: Pillow's number of the filter (0 nearest, 1 Lanczos,
    2 bilinear, 3 bicubic, 4 box, 5 Hamming); crop: (height, width) of the middle; then pixel * scale, less
    mean, over std, by channel. channels: their order.
    """

    convert_rgb: bool
    size: tuple[PositiveInt, PositiveInt] | PositiveInt | None
    resample: int | None
    crop: tuple[PositiveInt, PositiveInt] | None
    scale: float | None
    mean: Triple | None
    std: Triple | None
    channels: Literal["RGB"] = "RGB"


class Calling(Frozen):
    """What a driver needs beside the graphs' ports and aliases: values, and `rules` in words.

    prompt: None where there is no graph that takes a prompt. images: None where the model takes none, and
    where its checkpoint does not say how.
    """

    tokens: Tokens
    prompt: PromptCalls | None
    cache: CacheStart = CacheStart()
    sampling: SamplingDefaults = SamplingDefaults()
    images: ImagePreprocessing | None = None
    rules: dict[str, str] = Field(default_factory=dict)
