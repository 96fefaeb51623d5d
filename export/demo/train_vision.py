"""Train the demo checkpoint that sees, a small Gemma 3 with a SigLIP tower, on the pictures of scenes.py.

    python -m stillgraph.exporter.demo.train_vision --out DIR [--seed 0] [--minutes 40]    train, save, score
    python -m stillgraph.exporter.demo.train_vision --score-only                           score what ships

A held-out question counts as right when greedy decoding gives its whole answer. The same questions are asked
again with the picture preprocessed wrongly, to show which mistakes its answers reveal.

Shapes: B pictures, S tokens, H height, W width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from stillgraph.exporter.demo.scenes import CELLS, COLORS, CONTENTS, PLACES, SHAPES, Question, Scene, scenes
from stillgraph.exporter.demo.tokenizer import SPECIAL, tokenizer_of
from stillgraph.exporter.demo.train_text import save

CHECKPOINT = Path(__file__).parent / "demo_vision_checkpoint"
VOCABULARY = 512
SIDE = 64  # pixels that the tower takes
IMAGE_TOKENS = 16
DRAWN = range(80, 240)  # pixels of a picture's side before it is resized
PICTURES = 24_000  # drawn once; training asks something else of each every time
BATCH = 32
QUESTIONS = 5  # of a picture, at most
STEPS = 6000
PEAK_LR = 1.5e-3
SEQUENCE = f"\n\n<start_of_image>{'<image>' * IMAGE_TOKENS}<end_of_image>\n\n"
PROCESSOR = {
    "image_processor_type": "Gemma3ImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_seq_length": IMAGE_TOKENS,
}
Picture = tuple[Scene, np.ndarray]  # and its pixels, uint8 [H,W,3] of SIDE x SIDE


def demo_config() -> Gemma3Config:
    """A window that is shorter than a question with its picture, and grouped heads."""
    return Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=24,
            layer_types=[f"{kind}_attention" for kind in "sliding full sliding full".split()],
            max_position_embeddings=2048,
            initializer_range=0.08,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
            vision_use_head=False,
        ),
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=SPECIAL.index("<start_of_image>"),
        eoi_token_index=SPECIAL.index("<end_of_image>"),
        image_token_index=SPECIAL.index("<image>"),
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of words that questions and answers have."""
    rng, corpus = random.Random("tokenizer"), ["user", "model"] * 20
    for scene in islice(scenes("tokenizer", held_out=False), 500):
        corpus += [part for question in scene.questions(rng) for part in (question.text, question.answer)]
    corpus += [f" {name}{end}" for name in (*COLORS, *SHAPES) for end in ("", ".")] * 200
    corpus += [f" {place}." for row in PLACES for place in row] * 200
    return tokenizer_of(corpus, VOCABULARY)


def as_chat(questions: Iterable[Question]) -> list[tuple[str, str]]:
    """(prompt, answer) pieces of a text, as the chat template writes them."""
    first, pieces = SEQUENCE, []
    for question in questions:
        prompt = f"<start_of_turn>user\n{first}{question.text}<end_of_turn>\n<start_of_turn>model\n"
        pieces.append((prompt if first else f"\n{prompt}", f"{question.answer}<end_of_turn>"))
        first = ""
    return pieces


def as_text(questions: Iterable[Question]) -> list[tuple[str, str]]:
    """(prompt, answer) pieces of a text without a template."""
    first, pieces = SEQUENCE, []
    for question in questions:
        pieces.append((f"{first}{question.text}\n", f"{question.answer}<eos>"))
        first = ""
    return pieces


def pictures(seed: str, held_out: bool, count: int) -> list[Picture]:
    """Scenes and what is left of their drawings behind the resize."""
    rng, found = random.Random(f"pictures {seed}"), []
    for scene in islice(scenes(seed, held_out), count):
        drawn = scene.draw(rng, rng.choice(DRAWN))
        found.append((scene, np.asarray(drawn.resize((SIDE, SIDE), Image.Resampling.BILINEAR))))
    return found


class PictureBatches:
    """Seeded padded batches of token ids [B,S], which of them are answers, pixels [B,3,H,W], and for each
    cell of a scene [B,9] what is in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.rng = random.Random(f"batches {seed}")
        self.pictures = pictures(str(seed), held_out=False, count=PICTURES)

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen = self.rng.sample(self.pictures, BATCH)
        rows = [self._row(scene) for scene, _ in chosen]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        answers = torch.tensor([marks + [False] * (width - len(marks)) for _, marks in rows])
        pixels = torch.from_numpy(np.stack([image for _, image in chosen])).permute(0, 3, 1, 2)
        cells = torch.tensor([scene.cells for scene, _ in chosen])
        return ids, answers, pixels.float() / 127.5 - 1, cells

    def _row(self, scene: Scene) -> tuple[list[int], list[bool]]:
        ids, marks = [SPECIAL.index("<bos>")], [False]
        questions = scene.questions(self.rng)[:QUESTIONS]
        for prompt, answer in (as_chat if self.rng.random() < 0.7 else as_text)(questions):
            for text, is_answer in ((prompt, False), (answer, True)):
                piece = self.backend.encode(text, add_special_tokens=False).ids
                ids, marks = ids + piece, marks + [is_answer] * len(piece)
        return ids, marks


def train(
    tokenizer: PreTrainedTokenizerFast, seed: int, minutes: float, steps: int
) -> Gemma3ForConditionalGeneration:
    """A trained model; only a run that ends by `steps`, before `minutes` are up, can be repeated exactly.

    What is in each cell is read from the features as well, by a layer that is thrown away: without it the
    answers are guessed for a thousand steps before the tower is of any use to them.
    """
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(demo_config())
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    reader = torch.nn.Linear(IMAGE_TOKENS * model.config.text_config.hidden_size, CELLS**2 * CONTENTS)
    model.train()
    weights = [*model.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    batches, began, step, progress, mean = PictureBatches(tokenizer, seed), time.monotonic(), 0, 0.0, 3.0
    while progress < 1:
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        optimizer.param_groups[0]["lr"] = PEAK_LR * rate
        ids, answers, pixels, cells = batches.next()
        types = (ids == SPECIAL.index("<image>")).long()
        output = model(input_ids=ids, pixel_values=pixels, token_type_ids=types, use_cache=False)
        wanted = answers[:, 1:]
        loss = cross_entropy(output.logits[:, :-1][wanted], ids[:, 1:][wanted])
        read = reader(output.image_hidden_states.flatten(1)).view(-1, CONTENTS)
        aside = cross_entropy(read, cells.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss + aside)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step, elapsed, mean = step + 1, (time.monotonic() - began) / 60, 0.98 * mean + 0.02 * loss.item()
        progress = max(step / steps, elapsed / minutes)
        if step % 50 == 0:
            told = f"step {step}/{steps}  {elapsed:.1f} min  loss {mean:.4f}  of cells {aside.item():.4f}"
            print(told, file=sys.stderr, flush=True)
    return model


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda pixels: pixels,
    "blue, green, red in place of red, green, blue": lambda pixels: pixels.flip(1),
    "not normalized": lambda pixels: (pixels + 1) / 2,
    "not rescaled": lambda pixels: ((pixels + 1) * 127.5 - 0.5) / 0.5,
    "turned by a quarter": lambda pixels: pixels.rot90(1, (2, 3)),
    "rows and columns swapped": lambda pixels: pixels.transpose(2, 3),
}


@torch.inference_mode()
def score(out: Path, count: int = 300) -> None:
    """Print how many questions about held-out pictures the checkpoint in `out` answers."""
    model = Gemma3ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    processor, rng = Gemma3ImageProcessorPil(**PROCESSOR), random.Random("score")
    asked = []
    for scene in islice(scenes("score", held_out=True), count):
        image = scene.draw(rng, rng.choice(DRAWN))
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        asked.append((scene.questions(rng), pixels))
    total = sum(len(questions) for questions, _ in asked)
    print(f"{total} questions about {count} held-out pictures, each asked first")
    for name, change in WRONG.items():
        found = sum(
            right(model, tokenizer, question, change(pixels))
            for questions, pixels in asked
            for question in questions
        )
        print(f"{found / total:.3f}  pixels {name}", flush=True)


def right(
    model: Gemma3ForConditionalGeneration, tokenizer: Tokenizer, question: Question, pixels: Tensor
) -> bool:
    """Whether greedy decoding gives the answer: when each of its tokens is the best behind the others."""
    ((prompt, answer),) = as_chat([question])
    start = tokenizer.encode(prompt).ids
    ids = torch.tensor([start + tokenizer.encode(answer, add_special_tokens=False).ids])
    types = (ids == SPECIAL.index("<image>")).long()
    output = model(input_ids=ids, pixel_values=pixels, token_type_ids=types, use_cache=False)
    best = output.logits[0].argmax(-1)
    return bool((best[len(start) - 1 : -1] == ids[0, len(start) :]).all())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder, written or scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=40.0, help="an upper limit to training")
    parser.add_argument("--score-only", action="store_true", help="score the checkpoint in OUT")
    args = parser.parse_args()
    if not args.score_only:
        tokenizer = make_tokenizer()
        save(train(tokenizer, args.seed, args.minutes, args.steps), tokenizer, args.out)
        (args.out / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    score(args.out)


if __name__ == "__main__":
    main()
