"""Patches are declared with their reason, put in place for a while, and taken back whatever happens."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from stillgraph.exporter.families import families
from stillgraph.exporter.trace.tracing import EXPORTER
from stillgraph.patches.half_weights import half_linear
from stillgraph.patches.patch import Patch, applied
from stillgraph.patches.rms_norm import rms_norm


def declared() -> dict[str, Patch]:
    """Every patch of every family and of the exporter, by name."""
    found = {patch.name: patch for patch in EXPORTER}
    for family, tied in itertools.product(families().values(), (True, False)):
        text = SimpleNamespace(tie_word_embeddings=tied, rope_parameters={"rope_type": "longrope"})
        if family.features is None:  # the others have those of their decoder
            for target, precision in COMBINATIONS:
                found |= {patch.name: patch for patch in family.patches(text, target, precision)}
    return found


COMBINATIONS = (("portable", "fp32"), ("portable", "fp16"), ("onnxruntime", "fp32"))
ALL = declared()
RMS_NORM = rms_norm(Gemma3RMSNorm, shifted=True)


@pytest.mark.parametrize("patch", ALL.values(), ids=ALL)
def test_a_patch_says_why_and_until_when(patch: Patch) -> None:
    assert patch.reason
    assert patch.remove_when
    assert patch.upstream.startswith(("https://github.com/", "https://onnx.ai/onnx/operators/"))


@pytest.mark.parametrize("patch", ALL.values(), ids=ALL)
def test_the_original_is_restored_also_after_an_exception(patch: Patch) -> None:
    place, attribute = patch.holder()
    original = inspect.getattr_static(place, attribute)  # a class method is bound anew each time
    with pytest.raises(ZeroDivisionError), applied((patch,)):  # noqa: PT012 - the block is what fails
        assert getattr(place, attribute) is patch.replacement
        raise ZeroDivisionError
    assert inspect.getattr_static(place, attribute) is original


@pytest.mark.parametrize("patch", ALL.values(), ids=ALL)
def test_a_target_with_another_signature_is_refused(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, hidden_states: Tensor, scale: float = 1.0) -> None: ...

    place, attribute = patch.holder()
    monkeypatch.setattr(place, attribute, changed)
    with (
        pytest.raises(RuntimeError, match=f"patch {re.escape(patch.name)}: .*hidden_states.*expected"),
        applied((patch,)),
    ):
        pytest.fail("applied all the same")
    assert getattr(place, attribute) is changed


def test_a_refused_patch_takes_back_those_before_it() -> None:
    other = dataclasses.replace(half_linear(nn.Linear), signature=("self", "another"))
    original = Gemma3RMSNorm.forward
    with pytest.raises(RuntimeError), applied((RMS_NORM, other)):
        pytest.fail("applied all the same")
    assert Gemma3RMSNorm.forward is original


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("target", "precision"), [("portable", "fp32"), ("portable", "fp16"), ("onnxruntime", "fp32")]
)
def test_convert_leaves_torch_and_transformers_as_they_were(
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    precision: Any,
    fails: bool,
) -> None:
    from stillgraph.exporter.checkpoint import open_checkpoint
    from stillgraph.exporter.trace import tracing
    from stillgraph.spec import GraphShape

    def exporter(module: nn.Module, arguments: tuple[Tensor, ...], **_: Any) -> Any:
        """In place of the trace: one call of the module, with every patch in force."""
        assert tracing.ATTENTION in ALL_ATTENTION_FUNCTIONS
        assert Gemma3RMSNorm.forward is not before[0]
        module(*arguments)
        raise ZeroDivisionError

    places = [patch.holder() for patch in [RMS_NORM, *ALL.values()]]
    before = [getattr(*place) for place in places]
    attention = dict(ALL_ATTENTION_FUNCTIONS)
    dtype, checkpoint = torch.get_default_dtype(), open_checkpoint(str(tiny_checkpoint()))
    shape = GraphShape(role="decode", max_len=1, ctx=8, slack=None if target == "portable" else 3)
    if fails:
        monkeypatch.setattr(torch.onnx, "export", exporter)
        with pytest.raises(ZeroDivisionError):
            tracing.convert(checkpoint, shape, target, precision)
    else:
        tracing.convert(checkpoint, shape, target, precision)
    assert before == [getattr(*place) for place in places]
    assert dict(ALL_ATTENTION_FUNCTIONS) == attention
    assert torch.get_default_dtype() == dtype
