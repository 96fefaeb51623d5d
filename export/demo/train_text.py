"""Train the demo checkpoint, a small Gemma 3, on generated stories, then score its recall.

    python -m stillgraph.exporter.demo.train_text --out DIR [--seed 0] [--minutes 25]    train, save, score
    python -m stillgraph.exporter.demo.train_text --score-only                           score what ships

A held-out question counts as right when greedy decoding gives its whole answer. The same questions are
asked again with every global layer limited to the window of the others, to show which layers recall.

Shapes: B texts, S tokens, V vocabulary; token ids and loss weights are [B,S].
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from stillgraph.exporter.demo import stories as st
from stillgraph.exporter.demo.tokenizer import CHAT_TEMPLATE, SPECIAL, tokenizer_of

CHECKPOINT = Path(__file__).parent / "demo_checkpoint"
VOCABULARY = 1024
CONTEXT = 1024  # tokens of the longest text, in training as in scoring
STEPS = 2500
BATCH_TOKENS = 2048
POOL = 64  # texts drawn at a time, so that texts of similar length share a batch
PEAK_LR = 3e-3
ANSWER_WEIGHT = 8.0

Text = tuple[str, list[tuple[int, int]]]  # a text and the character spans that weigh more in the loss
Message = dict[str, str]


def demo_config() -> Gemma3TextConfig:
    """An irregular layer pattern and grouped heads, so that code which assumes either shows it here."""
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        layer_types=[f"{kind}_attention" for kind in "sliding sliding full sliding full sliding".split()],
        max_position_embeddings=2048,
        initializer_range=0.08,  # block outputs are normalized to 1: smaller embeddings would drown in them
    )


def exercise(rng: random.Random, teller: st.Teller) -> Text:
    """A story, then questions about its facts in any order; or an ending and no question."""
    if rng.random() < 0.15:
        teller.fill(rng.choice(st.ENDINGS))
        return teller.text + "<eos>", []
    text, spans = teller.text, []
    for fact in rng.sample(teller.facts, min(len(teller.facts), 6)):
        text += f"\nQuestion: {fact.question}\nAnswer:"
        spans.append((len(text), len(text) + len(fact.answer) + 1))
        text += f" {fact.answer}"
    return text + "<eos>", spans


def training_texts(rng: random.Random, words: int, chat: Callable[[list[Message]], str]) -> Iterator[Text]:
    """Texts of up to `words` words without end, two in three stories with questions, the others chats."""
    while True:
        teller = st.tell(rng, int(words * rng.random()), lambda fact: not st.is_held_out(fact))
        if rng.random() < 0.66:
            yield exercise(rng, teller)
        else:
            text = chat(st.chat(rng, words))
            yield text, short_turns(text)


def short_turns(text: str) -> list[tuple[int, int]]:
    """Spans of the model's turns of a rendered chat, each with the token that ends it; no stories."""
    spans, start, end = [], "<start_of_turn>model\n", "<end_of_turn>"
    at = text.find(start)
    while at >= 0:
        stop = text.index(end, at) + len(end)
        if stop - at < 120:
            spans.append((at + len(start), stop))
        at = text.find(start, stop)
    return spans


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Of words that stories and chats have."""
    rng = random.Random(f"tokenizer {seed}")
    corpus = [text for text, _ in (exercise(rng, st.tell(rng, 200, lambda fact: True)) for _ in range(300))]
    corpus += ["\n".join(m["content"] for m in st.chat(rng, 100)) for _ in range(300)]
    values = {value for attribute in st.ATTRIBUTES for value in attribute.values}
    corpus += sorted(f" {value}" for value in values) * 200  # a value in one token is recalled in one step
    return tokenizer_of([text.replace("<eos>", "") for text in corpus], VOCABULARY)


class Batches:
    """Seeded padded batches of token ids and loss weights, of texts that grow as training does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(f"batches {seed}")
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.ready: list[list[tuple[list[int], list[float]]]] = []

    def next(self, progress: float) -> tuple[Tensor, Tensor]:
        """Ids and weights [B,S], B*S at most BATCH_TOKENS, for training that is `progress` of 1 done."""
        if not self.ready:
            self._fill(60 if progress < 0.35 else 250 if progress < 0.6 else 700)
        rows = self.ready.pop()
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        return ids, torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows])

    def _fill(self, words: int) -> None:
        texts = training_texts(self.rng, words, self._render)
        rows = sorted((self._row(next(texts)) for _ in range(POOL)), key=lambda row: len(row[0]))
        batch: list[tuple[list[int], list[float]]] = []
        for row in rows:
            if (len(batch) + 1) * len(row[0]) > BATCH_TOKENS:
                self.ready.append(batch)
                batch = []
            batch.append(row)
        self.ready.append(batch)
        self.rng.shuffle(self.ready)

    def _render(self, messages: list[Message]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False)).removeprefix("<bos>")

    def _row(self, text: Text) -> tuple[list[int], list[float]]:
        encoding = self.backend.encode(text[0])
        weights = [1.0] * len(encoding.ids)
        for start, stop in text[1]:
            for at, (left, right) in enumerate(encoding.offsets):
                if start <= left < right <= stop:
                    weights[at] = ANSWER_WEIGHT
        return encoding.ids[:CONTEXT], weights[:CONTEXT]


def train(tokenizer: PreTrainedTokenizerFast, seed: int, minutes: float, steps: int) -> Gemma3ForCausalLM:
    """A trained model; only a run that ends by `steps`, before `minutes` are up, can be repeated exactly."""
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(demo_config())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    batches, began, step, progress, mean = Batches(tokenizer, seed), time.monotonic(), 0, 0.0, 5.0
    while progress < 1:
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        optimizer.param_groups[0]["lr"] = PEAK_LR * rate
        ids, weights = batches.next(progress)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B,S-1,V]
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, elapsed, mean = step + 1, (time.monotonic() - began) / 60, 0.98 * mean + 0.02 * loss.item()
        progress = max(step / steps, elapsed / minutes)
        if step % 50 == 0:
            print(f"step {step}/{steps}  {elapsed:.1f} min  loss {mean:.3f}", file=sys.stderr, flush=True)
    return model


def save(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint into `out` in bfloat16, with the files that a published Gemma 3 has."""
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone, which an installed package is not
    tokenizer.save_pretrained(out)
    turn = SPECIAL.index("<end_of_turn>")
    GenerationConfig.from_dict(
        {"bos_token_id": 2, "eos_token_id": [1, turn], "pad_token_id": 0}
    ).save_pretrained(out)
    if CHAT_TEMPLATE.resolve() != (out / CHAT_TEMPLATE.name).resolve():
        shutil.copy(CHAT_TEMPLATE, out)


def score(out: Path, seed: int, questions: int = 300) -> None:
    """Print how many held-out questions the checkpoint in `out` answers, by the tokens back to the fact."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = Gemma3ForCausalLM.from_pretrained(out, dtype=torch.float32)
    window, reach = model.config.sliding_window, sliding_reach(model.config)
    told = (Recall.of(story, tokenizer) for story in st.held_out(seed))
    asked = list(islice((r for r in told if r.distance > window and len(r.ids) <= CONTEXT), questions))
    answers = [(recall.distance, right(model, recall), right(model, recall, narrow=True)) for recall in asked]

    def share(low: int, high: int) -> str:
        rows = [row for row in answers if low < row[0] <= high]
        count = max(1, len(rows))
        free, held = (sum(row[at] for row in rows) / count for at in (1, 2))
        return f"{len(rows):9}  {free:.3f}  {held:.3f}"

    print(f"window {window}; sliding layers alone reach {reach} tokens back")
    print("tokens back  questions  right  right with global layers limited to the window")
    for low, high in pairwise(sorted({window, reach, 256, 512, CONTEXT})):
        print(f"{f'{low + 1}-{high}':>11}  {share(low, high)}")
    print(f"{'all':>11}  {share(0, CONTEXT)}", flush=True)


def sliding_reach(config: Gemma3TextConfig) -> int:
    """How far back the sliding layers can carry a token's value, each of them window - 1 at most."""
    kinds = config.layer_types or []
    return kinds.count("sliding_attention") * ((config.sliding_window or 1) - 1)


@dataclass(frozen=True)
class Recall:
    """A held-out question with its answer as token ids; `distance` leads back from value to value."""

    ids: tuple[int, ...]
    start: int  # of the answer
    distance: int

    @classmethod
    def of(cls, story: st.Story, tokenizer: Tokenizer) -> Recall:
        prompt, value = story.prompt, story.asked.value
        encoding = tokenizer.encode(f"{prompt} {story.answer}")
        said = len(prompt) + 1 + story.answer.rindex(value)
        at, fact, start = (encoding.char_to_token(i) or 0 for i in (said, story.asked.at, len(prompt)))
        return cls(tuple(encoding.ids), start, at - fact)


@torch.inference_mode()
def right(model: Gemma3ForCausalLM, recall: Recall, narrow: bool = False) -> bool:
    """Whether greedy decoding gives the answer; `narrow` limits the global layers to the sliding window.

    One pass over prompt and answer is enough: greedy text is the answer when each token of it is the best.
    """
    ids = torch.tensor([recall.ids])
    back = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    causal = (back >= 0)[None, None]
    window = causal & (back < (model.config.sliding_window or CONTEXT))
    masks = {"full_attention": window if narrow else causal, "sliding_attention": window}
    best = model(input_ids=ids, attention_mask=masks, use_cache=False).logits[0].argmax(-1)
    return bool((best[recall.start - 1 : -1] == ids[0, recall.start :]).all())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder, written or scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=25.0, help="an upper limit to training")
    parser.add_argument("--score-only", action="store_true", help="score the checkpoint in OUT")
    args = parser.parse_args()
    if not args.score_only:
        tokenizer = make_tokenizer(args.seed)
        save(train(tokenizer, args.seed, args.minutes, args.steps), tokenizer, args.out)
    score(args.out, args.seed)


if __name__ == "__main__":
    main()
