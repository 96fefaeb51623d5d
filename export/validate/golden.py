"""golden.json of a bundle: what PyTorch, with the bundle's weights, makes of a few prompts, token by token.

Most prompts are the first tokens of one text, so that one pass over it serves them all: where a prompt ends
PyTorch goes on by itself for some tokens, and its cache is then cut back to the text.
Shapes: B rows, N tokens of a text, V vocabulary.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, DynamicCache

from stillgraph.exporter.bundle.tokenizer_files import chat_ids
from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.precisions import ACTIVATION_ROUNDOFF, PRECISIONS
from stillgraph.exporter.validate import image as picture
from stillgraph.exporter.validate.cases import limit
from stillgraph.exporter.validate.gates import half_bound
from stillgraph.exporter.validate.reference import CHUNK
from stillgraph.golden import Case, Golden, StepLogits, Tolerance
from stillgraph.manifest import Manifest
from stillgraph.row import FinishReason
from stillgraph.spec import VisionSpec

# A step of PyTorch takes as long as reading all weights: 32 steps of a small model, 8 of a large one.
MOST_STEPS, LEAST_STEPS, READ = 32, 8, 8e9  # READ: weights in all steps of a prompt
LEFT = 3  # slots of the cache behind the prompt that ends at its last slot
BEST, SPREAD = 16, 16  # logits listed at a step
ROWS, AHEAD = 64, 3  # tokens that are tried for one a text soon ends after, and steps of each
ENDS = 2  # of passages, tried for the same
QUESTION = "Say yes."
FP32 = 1e-3  # a hundred times what ONNX Runtime is off by; a wrong slot, mask or position gives 0.1 and more
# Each of a layer's 4 products, and the head, rounds its input to 8 bits: errors add as the root of their
# number, of which the demo's logits are off by 0.3, and by 0.5 after an int8 prefill. 2 is four times that.
ROUNDED = 2.0


def make_golden(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, model: Any, text: np.ndarray
) -> Golden | None:
    """Of PyTorch's model with the bundle's weights; None for a bundle that cannot generate.

    text: ids [N] that prompts are cut from, as many as the cache takes.
    """
    graph = manifest.graph("prefill") if manifest.graph("decode") else manifest.graph("dynamic")
    if graph is None:
        return None
    weights = sum(parameter.numel() for parameter in model.parameters())
    most = int(np.clip(READ / weights, LEAST_STEPS, MOST_STEPS))
    maker = Maker(bundle, manifest, checkpoint, model, min(most, limit(manifest) // 4))
    prompts = lengths(manifest, graph.shape.max_len, graph.shape.ctx is not None)
    cases = [*maker.cut(text, prompts), *maker.stopping(text), *maker.seeing(text, graph.shape.max_len)]
    return Golden(
        precision=manifest.precision,
        target=manifest.target,
        tolerance=tolerance(manifest),
        cases=tuple(cases),
    )


def tolerance(manifest: Manifest) -> Tolerance:
    """Of a precision, as ONNX Runtime computes it: with few bits it rounds the inputs of products too."""
    spec, logits = manifest.model, FP32
    if PRECISIONS[manifest.precision].bits:
        logits = min(0.5, ROUNDED * ACTIVATION_ROUNDOFF * float(np.sqrt(4 * len(spec.layers) + 1)))
    elif manifest.precision == "fp16":
        logits = half_bound(spec)
    return Tolerance(logits=round(logits, 4), near_tie=round(2 * logits, 4))  # two logits may be off


def lengths(manifest: Manifest, chunk: int, continues: bool) -> dict[str, int]:
    """Tokens of the prompts that a text is cut to, ascending."""
    end, window = limit(manifest), min(manifest.model.windows, default=0)
    longest = end if continues else chunk
    across = [count for count in (2 * chunk + 1, chunk + 1) if count < end - 1]
    wanted = {"one_token": 1}
    if 2 < window < end - 1:
        wanted["across_window"] = window - 2
    if continues and across:
        wanted["across_chunks"] = across[0]
    else:
        wanted["whole_chunk"] = chunk
    wanted["context_end"] = end - LEFT
    fitting = {name: count for name, count in wanted.items() if 1 <= count <= min(longest, end - 1)}
    return dict(sorted(fitting.items(), key=lambda item: item[1]))


@dataclass(frozen=True)
class Maker:
    """Makes cases of one model. most: tokens of each."""

    bundle: Path
    manifest: Manifest
    checkpoint: Checkpoint
    model: Any
    most: int

    def cut(self, text: np.ndarray, prompts: dict[str, int]) -> Iterator[Case]:
        """Prompts that are the first tokens of a text, in ascending order."""
        text = text[: limit(self.manifest)]
        run = Run(self.model, self.manifest, text)
        for name, count in prompts.items():
            yield self.case(name, text[:count], run)

    def stopping(self, text: np.ndarray) -> Iterator[Case]:
        """The first prompt that is found which PyTorch ends with a stop token, if one is."""
        for prompt in self.endings(text):
            case = self.case("stops", np.array(prompt), Run(self.model, self.manifest, np.array(prompt)))
            if case.finish_reason == "stop":
                yield case
                return

    def endings(self, text: np.ndarray) -> Iterator[Sequence[int]]:
        """Prompts after which a text may end soon: a question, a passage without its end, single tokens."""
        tokens, longest = self.manifest.calling.tokens, (limit(self.manifest) - 1) // 2
        prompt = self.manifest.calling.prompt
        longest = longest if prompt is None or prompt.continues else min(longest, prompt.chunk)
        if not tokens.stop:
            return
        asked = chat_ids(self.bundle, tokens.bos, QUESTION)
        if asked is not None and len(asked) <= longest:
            yield asked
        for end in [at for at in np.flatnonzero(text == tokens.bos) if at > 2 * LEFT][:ENDS]:
            begin = int(max(np.flatnonzero(text[: end - 1] == tokens.bos), default=0))
            yield [text[begin], *text[begin + 1 : end - LEFT][-longest + 1 :]]
        last = self.manifest.model.vocab_size - 1
        tried = np.unique([*tokens.stop, *np.linspace(0, last, ROWS).astype(int)])
        tried = picture.without_pictures(tried, self.manifest.model.vision)
        cache, step, ended = DynamicCache(), torch.from_numpy(tried[:, None]), np.zeros(len(tried), bool)
        for _ in range(AHEAD):
            step = self.model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            ended |= np.isin(step[:, 0].numpy(), tokens.stop)
        yield from ([token] for token in tried[ended][:ENDS])

    def seeing(self, text: np.ndarray, chunk: int) -> Iterator[Case]:
        """A text with a picture in it, where the model sees."""
        vision, images = self.manifest.model.vision, self.manifest.calling.images
        if vision is None or images is None or self.manifest.graph("vision") is None:
            return
        ids = picture.with_picture(text[None], vision)[0, : picture.end(vision) + LEFT]
        if len(ids) > min(chunk, limit(self.manifest) - 1):
            return
        drawn = scene(vision)
        processor = AutoImageProcessor.from_pretrained(self.checkpoint.folder, backend="pil")
        pixels = processor(images=[drawn], return_tensors="pt")["pixel_values"]
        stream = io.BytesIO()
        drawn.save(stream, "PNG", optimize=True)
        run = Run(self.model, self.manifest, ids, pixels)
        yield self.case("picture", ids, run, base64.b64encode(stream.getvalue()).decode())

    def case(self, name: str, prompt: np.ndarray, run: Run, png: str | None = None) -> Case:
        """What PyTorch makes of a prompt, which is what its run was given."""
        steps, reason = run.after(len(prompt), self.most)
        near = tolerance(self.manifest).near_tie
        listed = [(index, some(logits)) for index, logits in enumerate(steps)]
        ends = {0, 1, len(steps) - 1}
        return Case(
            name=name,
            prompt=tuple(map(int, prompt)),
            picture_png=png,
            max_new_tokens=self.most,
            tokens=tuple(ids[0] for _, (ids, _) in listed),
            finish_reason=reason,
            logits=tuple(
                StepLogits(step=index, ids=ids, values=values)
                for index, (ids, values) in listed
                if index in ends or values[0] - values[1] < near * max(map(abs, values))
            ),
        )


@dataclass
class Run:
    """PyTorch over a text, with a growing cache. pixels: of the picture in it, [1, 3, H, W]."""

    model: Any
    manifest: Manifest
    text: np.ndarray
    pixels: torch.Tensor | None = None
    cache: DynamicCache = field(default_factory=DynamicCache)  # without a config it keeps all keys

    @torch.no_grad()
    def after(self, count: int, most: int) -> tuple[list[np.ndarray], FinishReason]:
        """Logits [V] of each token after the first `count` of the text, and why there are no more.

        count: more than at the call before.
        """
        stop, end = self.manifest.calling.tokens.stop, limit(self.manifest)
        found, reason = [self.read(count)], list[FinishReason]()
        while not reason:
            token, length = int(found[-1].argmax()), count + len(found)
            if token in stop:
                reason.append("stop")
            elif len(found) == most:
                reason.append("length")
            elif length > end:
                reason.append("context")
            else:
                found.append(self.feed(np.array([token])))
        if (more := self.cache.get_seq_length() - count) > 0:
            self.cache.crop(-more)
        return found, reason[0]

    def read(self, count: int) -> np.ndarray:
        """Feed the text up to `count` tokens; a picture whole, with the first piece."""
        while True:
            done = self.cache.get_seq_length()
            vision = self.manifest.model.vision
            size = picture.end(vision) if vision and self.pixels is not None and not done else CHUNK
            stop = min(count, done + size)
            logits = self.feed(self.text[done:stop])
            if stop == count:
                return logits

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Logits [V] after some tokens behind those in the cache."""
        given: dict[str, torch.Tensor] = {}
        chunk, vision = torch.from_numpy(ids[None].astype(np.int64)), self.manifest.model.vision
        if self.pixels is not None and vision is not None and not self.cache.get_seq_length():
            given["pixel_values"] = self.pixels
            if vision.bidirectional:
                given["token_type_ids"] = (chunk == vision.image_token).long()
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        found: np.ndarray = self.model(input_ids=chunk, **given, **options).logits[0, -1].float().numpy()
        return found


def some(logits: np.ndarray) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and values of some of the logits [V]: the best, then others from all over the vocabulary."""
    best = np.argsort(-logits, kind="stable")[:BEST].tolist()
    spread = np.linspace(0, len(logits) - 1, SPREAD).astype(int).tolist()
    ids = tuple(dict.fromkeys([*best, *spread]))
    return ids, tuple(float(f"{logits[token]:.7g}") for token in ids)


def scene(vision: VisionSpec) -> Image.Image:
    """Plain shapes, so that its PNG is small, of the size that the model takes."""
    down, across = np.mgrid[: vision.height, : vision.width]
    down, across = down / vision.height, across / vision.width
    pixels = np.full((vision.height, vision.width, 3), 230, np.uint8)
    pixels[(down > 0.1) & (down < 0.5) & (across > 0.1) & (across < 0.4)] = 214, 40, 40
    pixels[(down - 0.7) ** 2 + (across - 0.7) ** 2 < 0.04] = 40, 80, 210
    pixels[(down > 0.75) & (across < 0.3)] = 245, 205, 40
    return Image.fromarray(pixels)
