"""Every patch proves itself: same numbers with and without, original restored, changed target refused."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding

import patches
from patches.patch import Patch, applied

HALF = 2.0**-11  # relative rounding of a number to fp16


def declared() -> dict[str, Patch]:
    """Every patch of the package, by name."""
    modules = [
        importlib.import_module(f"patches.{module.name}") for module in pkgutil.iter_modules(patches.__path__)
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Patch)]
    return {patch.name: patch for patch in found}


ALL = declared()


def with_and_without(name: str, module: nn.Module, argument: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        plain = module(argument)
        with applied((ALL[name],)):
            return module(argument), plain


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def embedding() -> nn.Module:
    return seeded(Gemma3TextScaledWordEmbedding(40, 24, 0, embed_scale=24**0.5))


IDS = torch.tensor([[0, 39, 7], [7, 7, 1]])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
def test_rms_norm(scale: float) -> None:
    """At 1e-4 the epsilon of the root decides, at 3e3 (Gemma's residuals) it does not."""
    argument = scale * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    found, plain = with_and_without("rms_norm", seeded(Gemma3RMSNorm(48)), argument)
    # x / sqrt(m) for x * rsqrt(m): a few roundings of fp32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-9)


def test_rms_norm_keeps_the_dtype() -> None:
    found, plain = with_and_without(
        "rms_norm", seeded(Gemma3RMSNorm(8)), torch.ones(1, 8, dtype=torch.bfloat16)
    )
    assert found.dtype == plain.dtype == torch.bfloat16


def test_tied_embedding_is_exact() -> None:
    found, plain = with_and_without("tied_embedding", embedding(), IDS)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", ["half_embedding", "half_tied_embedding"])
def test_half_embedding_rounds_the_table_alone(name: str) -> None:
    module = embedding()
    found, plain = with_and_without(name, module, IDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=HALF, atol=0.0)
    assert not torch.equal(found, plain)
    rows = module.weight[IDS].half().float() * module.embed_scale
    assert torch.equal(found, rows)


@pytest.mark.parametrize("bias", [True, False])
def test_half_linear(bias: bool) -> None:
    module = seeded(nn.Linear(48, 16, bias=bias))
    argument = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    found, plain = with_and_without("half_linear", module, argument)
    assert found.dtype == torch.float32
    # Input and matrix round once each, and the product: three half roundings of the sum of magnitudes.
    room = 3 * HALF * (argument.abs() @ module.weight.abs().t() + 1.0)
    assert ((found - plain).abs() <= room).all()
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("patch", ALL.values(), ids=ALL)
def test_a_patch_says_why_and_until_when(patch: Patch) -> None:
    assert patch.reason
    assert patch.remove_when
    assert patch.upstream.startswith("https://github.com/")


@pytest.mark.parametrize("patch", ALL.values(), ids=ALL)
def test_the_original_is_restored_also_after_an_exception(patch: Patch) -> None:
    place, attribute = patch.holder()
    original = getattr(place, attribute)
    with pytest.raises(ZeroDivisionError), applied((patch,)):  # noqa: PT012 - the block is what fails
        assert getattr(place, attribute) is patch.replacement
        raise ZeroDivisionError
    assert getattr(place, attribute) is original


@pytest.mark.parametrize("patch", ALL.values(), ids=ALL)
def test_a_target_with_another_signature_is_refused(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, hidden_states: Tensor, scale: float = 1.0) -> None: ...

    place, attribute = patch.holder()
    monkeypatch.setattr(place, attribute, changed)
    with (
        pytest.raises(RuntimeError, match=f"patch {patch.name}: .*hidden_states.*expected"),
        applied((patch,)),
    ):
        pytest.fail("applied all the same")
    assert getattr(place, attribute) is changed


def test_a_refused_patch_takes_back_those_before_it() -> None:
    first = ALL["rms_norm"]
    other = dataclasses.replace(ALL["half_linear"], signature=("self", "another"))
    original = Gemma3RMSNorm.forward
    with pytest.raises(RuntimeError), applied((first, other)):
        pytest.fail("applied all the same")
    assert Gemma3RMSNorm.forward is original


def test_importing_patches_changes_nothing() -> None:
    """In a fresh process: the targets before and after the import of every patch are the same objects."""
    script = """
import importlib, pkgutil
import torch.nn
from transformers.models.gemma3 import modeling_gemma3 as gemma3
places = [torch.nn.Linear, gemma3.Gemma3RMSNorm, gemma3.Gemma3TextScaledWordEmbedding]
before = [place.forward for place in places]
import patches
for module in pkgutil.iter_modules(patches.__path__):
    importlib.import_module(f"patches.{module.name}")
assert before == [place.forward for place in places]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_convert_leaves_torch_and_transformers_as_they_were(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, precision: str, fails: bool
) -> None:
    from export import convert
    from export.checkpoint import open_checkpoint
    from runtime.spec import GraphShape

    def exporter(module: nn.Module, arguments: tuple[Tensor, ...], **_: Any) -> Any:
        """In place of the trace: one call of the module, with every patch in force."""
        assert convert.ATTENTION in ALL_ATTENTION_FUNCTIONS
        assert Gemma3RMSNorm.forward is not before[0]
        module(*arguments)
        raise ZeroDivisionError

    places = [patch.holder() for patch in [ALL["rms_norm"], *ALL.values()]]
    before = [getattr(*place) for place in places]
    attention = dict(ALL_ATTENTION_FUNCTIONS)
    dtype, checkpoint = torch.get_default_dtype(), open_checkpoint(str(tiny_checkpoint()))
    shape = GraphShape(role="decode", slots=1, ctx=8)
    if fails:
        monkeypatch.setattr(torch.onnx, "export", exporter)
        with pytest.raises(ZeroDivisionError):
            convert.convert(checkpoint, shape, precision)
    else:
        convert.convert(checkpoint, shape, precision)
    assert before == [getattr(*place) for place in places]
    assert dict(ALL_ATTENTION_FUNCTIONS) == attention
    assert torch.get_default_dtype() == dtype
