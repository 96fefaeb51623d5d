"""What the README promises, kept on real weights; no part of `make test`, which needs no network.

    make real

Expected tokens are transformers'. A graph's token must be the one of the largest logit that transformers has
after the same ids, or within TIE of it: sums in another order may change such a pair of tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillgraph
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.manifest import read
from tests.real.dither import write_dithered
from tests.real.fetch import MODELS, PLACE, NotThereError, fetch

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")
P, CTX, COUNT = 128, 1024, 32
TIE = 1e-3  # of logits up to 40, whose own error in fp32 is below 1e-4
MAX_KL = 0.01
CPUS = ("--target", "onnxruntime")  # fp32 and the growing graph are portable
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHORT: dict[tuple[str, str], str] = {}  # what is known to fall short, by model and precision, and by how much


@dataclass(frozen=True)
class Real:
    """A model, the folder of its dithered weights, and the bundles of it that were asked for."""

    name: str
    gguf: Path
    folder: Path

    @cached_property
    def reference(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def lengths(self) -> list[int]:
        window = self.reference.config.get_text_config().to_dict().get("sliding_window")
        return sorted({1, P, P + 1, *([window, window + 1] if window else []), CTX - 1})

    def ids(self, count: int) -> list[int]:
        ids: list[int] = self.tokenizer(TEXT).input_ids[:count]
        assert len(ids) == count
        return ids

    def bundle(self, name: str, *options: str, model: Path | None = None) -> Path:
        """Made by the command line in a process of its own; its exit code is in `code` beside it."""
        place = PLACE / self.name / name
        if (done := place.with_name(f"{name}.code")).is_file():
            return place
        command = [
            sys.executable,
            "-m",
            "stillgraph",
            "export",
            *options,
            "--model",
            str(model or self.folder),
        ]
        code = subprocess.run([*command, "--out", str(place)], cwd=ROOT).returncode
        done.write_text(str(code))
        return place

    def code(self, name: str) -> int:
        return int((PLACE / self.name / f"{name}.code").read_text())

    def fp32(self) -> Path:
        return self.bundle("fp32", "bundle")


@pytest.fixture(scope="module", params=MODELS)
def real(request: pytest.FixtureRequest) -> Real:
    try:
        gguf = fetch(MODELS[request.param])
    except NotThereError as error:
        pytest.skip(str(error))
    folder = gguf.parent / "checkpoint"
    for old in gguf.parent.glob("*.code"):
        old.unlink()
    made = Real(request.param, gguf, write_dithered(gguf, folder))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return made


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[N, V], without a cache."""
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def follows(model: Any, ids: list[int], made: list[int]) -> None:
    """That a model makes these tokens after these ids, by itself."""
    logits = logits_of(model, ids + made)[len(ids) - 1 : -1]
    lost = logits.amax(-1) - logits.gather(-1, torch.tensor(made)[:, None])[:, 0]
    assert lost.max() <= TIE, f"token {int((lost > TIE).nonzero()[0])} of {len(made)} is another"


def test_fp32_ends_valid(real: Real) -> None:
    validation = read(real.fp32()).validation
    assert real.code("fp32") == 0
    assert validation is not None
    assert validation.passed


def test_tokens_are_transformers_across_every_edge(real: Real) -> None:
    with stillgraph.load(real.fp32()) as engine:
        for length in real.lengths:
            ids = real.ids(length)
            made = [step.token for step in engine.stream(ids, max_new_tokens=COUNT, stop_tokens=())]
            assert len(made) == min(COUNT, CTX + 1 - length)
            follows(real.reference, ids, made)


def test_text_is_tokenized_as_transformers_does(real: Real) -> None:
    with stillgraph.load(real.fp32()) as engine:
        assert engine.ids(TEXT[:3000]) == real.tokenizer(TEXT[:3000]).input_ids


def test_a_chat_by_the_models_own_template(real: Real) -> None:
    if real.tokenizer.chat_template is None:
        pytest.skip(f"{real.name}: the GGUF has no chat template")
    ids = real.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    with stillgraph.load(real.fp32()) as engine:
        assert engine.ids(QUESTION) == ids
        steps = list(engine.stream(QUESTION, max_new_tokens=100))
    assert "Paris" in "".join(step.text for step in steps)
    assert steps[-1].finish_reason == "stop"
    follows(real.reference, ids, [step.token for step in steps])


def test_a_growing_cache_makes_the_same(real: Real) -> None:
    growing, ids = real.bundle("growing", "dynamic"), real.ids(P + 1)
    assert real.code("growing") == 0
    with stillgraph.load(growing) as engine:
        made = [step.token for step in engine.stream(ids, max_new_tokens=COUNT, stop_tokens=())]
    follows(real.reference, ids, made)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_bits_end_valid(real: Real, precision: str, request: pytest.FixtureRequest) -> None:
    if reason := SHORT.get((real.name, precision)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    place = real.bundle(precision, "bundle", *CPUS, "--precision", precision)
    report = json.loads((place / "reports" / "parity.json").read_text())
    print(f"{real.name} {precision}: {json.dumps(report['quality'])}")
    assert real.code(precision) == 0


def test_int8_costs_next_to_nothing_on_a_real_text(real: Real) -> None:
    """Mean KL divergence in nats from transformers' fp32, over the second half of a prompt of 512 tokens."""
    place, ids, start = real.bundle("int8", "bundle", *CPUS, "--precision", "int8"), real.ids(512), 256
    expected = logits_of(real.reference, ids).log_softmax(-1)[start:].double()
    found = []
    with stillgraph.load(place) as engine:
        for theirs, ours in zip(expected, engine.logits(ids, start=start), strict=True):
            logprobs = torch.from_numpy(np.asarray(ours)).double().log_softmax(-1)
            found.append(float((theirs.exp() * (theirs - logprobs)).sum()))
    kl = float(np.mean(found))
    print(f"{real.name} int8: mean KL {kl:.2e}, largest {max(found):.2e} over {len(found)} positions")
    assert 0 < kl <= MAX_KL


def test_the_gguf_itself_is_a_checkpoint(real: Real) -> None:
    place = real.bundle("gguf", "bundle", *CPUS, "--no-validate", model=real.gguf)
    assert real.code("gguf") == 0
    ids, reference = real.ids(P + 1), open_checkpoint(str(real.gguf)).load()
    with stillgraph.load(place) as engine:
        made = [step.token for step in engine.stream(ids, max_new_tokens=COUNT, stop_tokens=())]
    follows(reference, ids, made)
