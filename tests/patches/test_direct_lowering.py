"""A graph that is lowered without a second trace computes what torch does, and is the one of the exporter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.ir.simplify import fold
from stillgraph.exporter.trace import tracing
from stillgraph.patches import direct_lowering
from stillgraph.patches.direct_lowering import DIRECT_LOWERING
from stillgraph.patches.patch import applied
from stillgraph.spec import GraphShape


class Casts(nn.Module):
    """No-ops beside casts that change a number."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        halves = x.to(torch.float16).to(x.device).float() + y.to(y.dtype)
        whole = (halves.type_as(x) * 3).to(torch.int32).to(torch.float32)
        mask = (x > 0) & (y > 0) | (x < -1)
        return torch.where(mask, whole, halves).detach() + torch.tensor([0.25, 0.5, 0.75, 1.0])


class InPlace(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x.clone()
        z[:, 1:3].mul_(y[:, 1:3])
        return z.to(torch.float32)


class Convolution(nn.Module):
    def __init__(self, padding: str = "valid") -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, (2, 3), padding=padding)
        nn.init.constant_(self.layer.weight, 0.25)
        nn.init.constant_(self.layer.bias, 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer((x + y).view(1, 1, 3, 4))


class Padded(Convolution):
    def __init__(self) -> None:
        super().__init__("same")


class WithoutFunction(nn.Module):
    """`aten.dist` has no ONNX function: the exporter replaces it by others."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + torch.dist(x.to(torch.float32), y)


@pytest.mark.parametrize(
    ("model", "again"),
    [(Casts, False), (Convolution, False), (Padded, True), (InPlace, True), (WithoutFunction, True)],
)
def test_it_computes_what_torch_does(
    model: Callable[[], nn.Module], again: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, traced = direct_lowering.decompose_with_registry, []
    monkeypatch.setattr(
        direct_lowering, "decompose_with_registry", lambda *args: traced.append(1) or original(*args)
    )
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).mul(3).unbind()
    with applied((DIRECT_LOWERING,)), tracing.quiet(), torch.no_grad():
        program = torch.onnx.export(
            model().eval(), (x, y), dynamo=True, optimize=False, verbose=False, input_names=["x", "y"]
        )
    assert program is not None
    program.save(tmp_path / "graph.onnx")
    session = ort.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    given = {port.name: tensor.numpy() for port, tensor in zip(session.get_inputs(), (x, y), strict=True)}
    found: Any = session.run(None, given)[0]
    np.testing.assert_allclose(found, model()(x, y).detach().numpy(), rtol=1e-6)
    assert bool(traced) == again


@pytest.mark.parametrize(
    ("target", "precision", "shape"),
    [
        ("portable", "fp32", GraphShape(role="prefill", max_len=16, ctx=40)),
        ("onnxruntime", "fp16", GraphShape(role="decode", max_len=1, ctx=40, slack=15)),
    ],
)
def test_the_graph_is_that_of_the_exporter(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, target: Any, precision: Any, shape: GraphShape
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint()))

    def ops() -> Counter[str]:
        model = fold(tracing.convert(checkpoint, shape, target, precision))
        RemoveUnusedNodesPass()(model)
        return Counter(node.op_type for node in model.graph if node.op_type not in ("Constant", "Identity"))

    with monkeypatch.context() as direct_alone:
        direct_alone.setattr(direct_lowering, "decompose_with_registry", None)
        direct = ops()
    monkeypatch.setattr(tracing, "EXPORTER", ())
    assert direct == ops()
