"""Which products of a model leave the range of fp16, in which their inputs and results are.

ONNX Runtime on a CPU computes fp16 in fp32, so only measuring shows what becomes infinite elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from stillgraph.calling import Tokens
from stillgraph.exporter.checkpoint import HEAD, Checkpoint
from stillgraph.exporter.streaming import streamed
from stillgraph.exporter.texts.passages import cut_chunks, default_texts
from stillgraph.spec import VisionSpec

ROWS = 1 << 15  # of the head in fp32 at once
TEXT = 512  # tokens of each text
LARGEST = 65504.0  # of fp16
# Other texts reach further than those measured, and sums may be larger on their way than at their end. The
# massive activations of first tokens hardly depend on the text (Sun et al. 2024, "Massive Activations in
# Large Language Models"); three of fp16's sixteen doublings above 1 are left for all else.
MARGIN = 8.0
LIMIT = LARGEST / MARGIN


def checkpoint_magnitudes(checkpoint: Checkpoint, folder: Path, tokens: Tokens) -> dict[str, float]:
    """`magnitudes` of a checkpoint over random ids and the beginnings of texts.

    folder: a bundle's, where its tokenizer is; tokens: its special tokens.
    """
    spec = checkpoint.spec
    length = min(TEXT, spec.max_position_embeddings)
    texts = [np.random.default_rng(0).integers(0, spec.vocab_size, (1, length))]
    if spec.vision is not None:
        texts[0][texts[0] == spec.vision.image_token] -= 1
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer, shipped = Tokenizer.from_file(str(path)), default_texts(checkpoint.folder)
        bos = tokens.bos if tokens.tokenizer_adds_bos else None
        texts += [cut_chunks(text.ids(tokenizer), length, 1, bos) for text in shipped]
    if spec.vision is not None:
        return magnitudes(checkpoint.load(), texts, spec.vision)
    return text_magnitudes(checkpoint, texts)


@torch.no_grad()
def text_magnitudes(checkpoint: Checkpoint, texts: Sequence[np.ndarray]) -> dict[str, float]:
    """`magnitudes` of a checkpoint of text alone, a layer of which is in memory at a time."""
    model, found = checkpoint.build("eager"), dict[str, float]()
    decoder = checkpoint.family.decoder(model)
    by_length: dict[int, list[np.ndarray]] = {}
    for ids in texts:
        by_length.setdefault(ids.shape[1], []).append(ids)
    with streamed(checkpoint, model) as embedded, _watched(model, found):
        for group in by_length.values():
            rows = embedded(torch.from_numpy(np.concatenate(group)))
            hidden = decoder(input_ids=rows, use_cache=False).last_hidden_state[:, -1]
            _watch_head(checkpoint, hidden, found)
    return found


def _watch_head(checkpoint: Checkpoint, hidden: Tensor, found: dict[str, float]) -> None:
    for rows in torch.split(checkpoint.head(), ROWS):
        part = rows.to(torch.float32)
        for value in (part, hidden, functional.linear(hidden, part)):
            _keep(found, HEAD.removesuffix(".weight"), value)


def _keep(found: dict[str, float], name: str, value: Tensor) -> None:
    largest = float(value.abs().max())
    found[name] = max(found.get(name, 0.0), largest if np.isfinite(largest) else np.inf)


@torch.no_grad()
def magnitudes(model: Any, texts: Iterable[np.ndarray], vision: VisionSpec | None = None) -> dict[str, float]:
    """The largest magnitude in weight, input or result, less its bias, of each linear module, by name.

    texts: token ids, int64 [B, N] each; vision: of a model that sees, which is then given noise as a picture
    before a text as well. A value that is no number counts as infinite.
    """
    found: dict[str, float] = {}
    with _watched(model, found):
        for ids in texts:
            model(input_ids=torch.from_numpy(ids), use_cache=False, logits_to_keep=1)
            if vision is not None:
                _look(model, torch.from_numpy(ids), vision)
                vision = None
    return found


def beyond(found: Mapping[str, float], limit: float = LIMIT) -> dict[str, float]:
    """Those over the limit, the largest first."""
    over = {name: value for name, value in found.items() if not value <= limit}
    return dict(sorted(over.items(), key=lambda pair: -pair[1]))


def keep_fp32(model: nn.Module, names: Iterable[str]) -> None:
    """Let some linear modules compute in fp32, whatever a patch makes of their class."""
    for name in names:
        module = model.get_submodule(name)
        module.forward = MethodType(_linear, module)


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    """`nn.Linear.forward`, which may be patched."""
    return functional.linear(input, self.weight, self.bias)


def _look(model: Any, ids: Tensor, vision: VisionSpec) -> None:
    """A picture of noise before the first tokens of a text."""
    generator = torch.Generator().manual_seed(0)
    size = 1, vision.channels, vision.height, vision.width
    picture = torch.full((1, vision.image_tokens), vision.image_token)
    given = torch.cat([ids[:1, :1], picture, ids[:1, 1:9]], 1)
    options: dict[str, Tensor] = {"pixel_values": torch.randn(size, generator=generator)}
    if vision.bidirectional:
        options["token_type_ids"] = (given == vision.image_token).long()
    model(input_ids=given, use_cache=False, logits_to_keep=1, **options)


@contextmanager
def _watched(model: nn.Module, found: dict[str, float]) -> Iterator[None]:
    """Keep the largest magnitude of each linear module while the model runs."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            product = output if module.bias is None else output - module.bias
            for value in (module.weight, inputs[0], product):
                _keep(found, name, value)

        return hook

    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
