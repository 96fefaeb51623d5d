"""What an export takes of disk, memory and time, by the sizes of its tensors: said before it starts.

The constants were measured on two cores (tests/sizes/README.md); the time of a calibration comes from the
speed of a product on this machine.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stillgraph.errors import StillgraphError
from stillgraph.exporter.bundle.calibration import BETTER, MEASURED, measured_for, tokens_for
from stillgraph.exporter.calibration import NONE, SAMPLES
from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import ExportConfig
from stillgraph.exporter.few_bits import BUDGET, TABLES
from stillgraph.exporter.memory import available_memory
from stillgraph.exporter.precisions import CALIBRATED, PRECISIONS
from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.quantize.sensitivity import bits_of
from stillgraph.exporter.streaming import stay
from stillgraph.ports import input_ports
from stillgraph.spec import GraphShape

STAGE = "export"
BASE = 0.5e9  # bytes: Python, torch, transformers and ONNX Runtime
A_NUMBER = 4.1  # bytes for each number of the largest tensor, which is in fp32 when graphs are compared
A_LAYER = 5e6  # bytes, of traces
CACHES = 3  # sizes of one cache, in files, that such a comparison takes
HALVES = 8  # fp32 copies of one product's inputs, as they are and as rounded, and what is made of them
DRAWING = 1.1  # of the layers in fp32, while samples are drawn
IMPORTS, GRAPH, LAYER = 10.0, 4.0, 0.3  # seconds of a start, of a graph, and of each of its layers
A_WEIGHT = {"fp32": 6e-9, "fp16": 10e-9, "int8": 30e-9, "int4": 45e-9}  # seconds to write a number, and check
EFFICIENCY = 0.4  # of a product's speed in all that a calibration does
PASSES = 7  # over each column of a matrix, in products with all others, to round it


@dataclass(frozen=True)
class Estimate:
    """Bytes beside the bundle's folder, bytes of memory that is no file's, and seconds. Good for a factor of
    1.5; proving the bundle afterwards is not in it."""

    disk: float
    memory: float
    seconds: float

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} minutes" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        return f"about {self.disk / 1e9:.2f} GB of disk, {self.memory / 1e9:.1f} GB of memory and {minutes}"


def estimate(config: ExportConfig, checkpoint: Checkpoint, shapes: Sequence[GraphShape]) -> Estimate:
    """Of an export of graphs that takes nothing over from another bundle."""
    sizes = {name: tuple(tensor.shape()) for name, tensor in checkpoint.tensors.items()}
    numbers = {name: math.prod(shape) for name, shape in sizes.items()}
    layers = len(checkpoint.spec.layers)
    disk = sum(
        numbers[name] * stored_bits(config, checkpoint, name, shape) / 8 for name, shape in sizes.items()
    )
    matrices = [shape for name, shape in sizes.items() if len(shape) == 2 and not _is_table(name)]
    memory = BASE + A_NUMBER * max(numbers.values()) + A_LAYER * layers
    disk += CACHES * max(_cache_bytes(checkpoint, shape) for shape in shapes)
    seconds = IMPORTS + len(shapes) * (GRAPH + LAYER * layers)
    seconds += sum(numbers.values()) * A_WEIGHT[config.precision]
    if config.quantization is not None:
        weights = sum(map(math.prod, matrices))
        fast = any(shape.int8_activations for shape in shapes)
        if config.calibrate != NONE:  # forth for what inputs there are; back as well for what rounding costs
            seconds += (6 + 8 * fast) * MEASURED * weights / (EFFICIENCY * speed())
        if config.calibrate == SAMPLES and stay(weights):
            memory = max(memory, BASE + DRAWING * 4 * weights)
        disk += weights * fast
        if config.quantization.calibration is not None:
            disk += 1.1 * weights  # codes, a byte each, and scales
            widest = max(columns for _, columns in matrices)
            tokens = tokens_for(matrices)
            memory = max(memory, BASE + HALVES * 4 * tokens * widest)
            seconds += _operations(matrices, tokens, _rounded(config)) / (EFFICIENCY * speed())
    return Estimate(disk, memory, seconds)


def stored_bits(config: ExportConfig, checkpoint: Checkpoint, name: str, shape: Sequence[int]) -> float:
    """Bits a number of a tensor takes in the bundle, scales and zero points included."""
    how = config.quantization
    if how is None or len(shape) != 2:
        return 16 if config.precision == "fp16" else 32
    plan = StoragePlan(config.target, config.precision, how, tied=checkpoint.tied)
    form = plan.form_for((name,), shape[0], tied=name == checkpoint.tied)
    if form is None:
        return 32
    if how.mixed and form.bits == PRECISIONS[CALIBRATED].bits:
        return how.budget or BUDGET
    return bits_of(form, shape[1])


def refuse(found: Estimate, place: Path) -> None:
    """Raises StillgraphError where the machine has not what an export takes."""
    folder = next(folder for folder in place.resolve().parents if folder.exists())
    if found.disk > (free := shutil.disk_usage(folder).free):
        problem = f"the bundle takes {found.disk / 1e9:.2f} GB of disk, and {folder.name or folder} has "
        raise StillgraphError(STAGE, f"{problem}{free / 1e9:.2f} GB", "free space or give another --out")
    if (available := available_memory()) is not None and found.memory > available:
        problem = (
            f"the export takes {found.memory / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free"
        )
        raise StillgraphError(STAGE, problem, "end other programs, or export on a larger machine")


def speed() -> float:
    """Operations a second of an fp32 product on this machine."""
    size, times = 768, list[float]()
    matrix = torch.ones(size, size)
    for _ in range(4):
        began = time.monotonic()
        matrix @ matrix
        times.append(time.monotonic() - began)
    return 2.0 * size**3 / min(times)


def _rounded(config: ExportConfig) -> float:
    """The share of the layers' numbers that is rounded to four bits; the others get eight."""
    how = config.quantization
    if how is None or not how.mixed:
        return 1.0
    plan = StoragePlan(config.target, config.precision, how)
    few, many = (bits_of(form, form.block) for form in (plan.form(CALIBRATED), plan.form(BETTER)))
    return min(1.0, max(0.0, (many - (how.budget or BUDGET)) / (many - few)))


def _operations(matrices: Sequence[tuple[int, ...]], tokens: int, rounded: float) -> float:
    """Of a calibration: samples drawn, a part of them forth and back, all twice through the layers, and a
    share of the matrices rounded for the moments of their inputs."""
    texts = sum(map(math.prod, matrices)) * (6 * tokens + 8 * measured_for(tokens))
    moments = sum(columns**2 * (tokens + columns) for _, columns in matrices)
    return texts + rounded * (moments + 2 * PASSES * sum(rows * columns**2 for rows, columns in matrices))


def _cache_bytes(checkpoint: Checkpoint, shape: GraphShape) -> int:
    if shape.grows:
        return 0
    return sum(port.nbytes for port in input_ports(checkpoint.spec, shape) if port.is_cache)


def _is_table(name: str) -> bool:
    return any(table in name for table in TABLES)
