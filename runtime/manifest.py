"""The bundle's manifest: the whole contract between an export and a runtime in any language."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from stillgraph.calling import Calling
from stillgraph.errors import StillgraphError, first_line, wrong_field
from stillgraph.ports import Port, PortRole, input_ports, of_role, output_ports
from stillgraph.remake import remaking_command
from stillgraph.spec import Frozen, GraphShape, ModelSpec
from stillgraph.weight_tensor import WeightTensor

FORMAT_VERSION: Literal[5] = 5
MANIFEST = "manifest.json"

Target = Literal["portable", "onnxruntime"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or path in ("", "."):
        raise ValueError(f"path {path!r} leaves the bundle")
    return path


Version = Annotated[str, StringConstraints(pattern=r"^\d+\.\d+(\.\d+)?$")]
RelativePath = Annotated[str, AfterValidator(_inside)]


class File(Frozen):
    """A file of the bundle: path relative to it, size in bytes, SHA-256 of its content.

    page_sums: compared at each loading, as that costs next to nothing; `page_cache.read_in` says what they
    are.
    """

    path: RelativePath
    nbytes: NonNegativeInt
    sha256: Sha256
    page_sums: Sha256 | None = None


class Weights(Frozen):
    """The one weights file every graph points into."""

    file: File
    tensors: dict[str, WeightTensor]


class Alias(Frozen):
    """An output that becomes an input of the next call.

    same_buffer: a permission. Both may be bound to one buffer, which saves memory and a copy, and need not
    be: with buffers of their own the results are the same. Without it they must not share one.
    """

    output: str
    input: str
    same_buffer: bool


class Ops(Frozen):
    """What a graph needs of a runtime. opsets: its version by domain, `` for ONNX's own; custom: ops of other
    domains, by domain; onnxruntime: the least version of ONNX Runtime that runs it, None where that is not
    known."""

    opsets: dict[str, PositiveInt] = Field(default_factory=dict)
    custom: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    onnxruntime: Version | None = None


class GraphEntry(Frozen):
    """One graph: what fixes its shape, its file, and everything needed to call it.

    weights: tensors of the weights file that it reads whole; tables: those of which it reads the rows of its
    ids alone.
    """

    shape: GraphShape
    file: File
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: tuple[Alias, ...]
    weights: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    ops: Ops = Ops()

    def input(self, role: PortRole) -> Port:
        """The input of a role that no layer has its own of. Raises KeyError where there is none."""
        return of_role(self.inputs, role)

    def output(self, role: PortRole) -> Port:
        """As `input`, of the outputs."""
        return of_role(self.outputs, role)

    def takes(self, role: PortRole) -> bool:
        """Whether it has an input of a role."""
        return any(port.role == role for port in self.inputs)


class CheckpointSource(Frozen):
    """Where the weights came from: the model as the user named it, and a hash of the checkpoint's files."""

    id: str
    model_type: str
    checkpoint_sha256: Sha256


class Quantization(Frozen):
    """How weights of int8 and int4 are stored: blocks of a row's weights share a scale, and a zero point.

    symmetric: no zero points; keep: patterns of weight names and the precision those are kept at instead;
    fast_prefill: there is a second prefill graph of int8 activations, with weights of its own: int8, one
    scale an output channel; blocked: those that it, too, reads in blocks, since one scale a token would round
    their inputs too coarsely. calibration: what four bits were rounded for, `samples` of the model's own or
    the SHA-256 of a text; budget: bits a weight of the layers, or kl: nats that their four bits may cost;
    better: as keep, what is measured to be worth it. refine: how many tokens get a score of eight bits, those
    that score best by the upper four bits of a head; 0 for all. A head of under 16 times as many has one
    product.
    """

    block_size: PositiveInt
    symmetric: bool = True
    keep: dict[str, Precision] = Field(default_factory=dict)
    fast_prefill: bool = False
    blocked: tuple[str, ...] = ()
    calibration: str | None = None
    budget: float | None = None
    kl: float | None = None
    better: dict[str, Precision] = Field(default_factory=dict)
    refine: NonNegativeInt = 0

    @property
    def mixed(self) -> bool:
        """Whether weights that matter have more bits."""
        return self.budget is not None or self.kl is not None


class Quality(Frozen):
    """What quantized weights cost: the graph's logits against those of the checkpoint's own weights.

    text: whether over a text, or over random ids; kl: mean KL divergence in nats; top1_agreement: share of
    positions with the same best token; perplexity: of the text, and the checkpoint's;
    ratio_error: standard error of their ratio; recall: share of the demo's questions answered.
    """

    text: bool
    positions: PositiveInt
    kl: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float
    ratio_error: float = 0.0
    recall: float | None = None
    original_recall: float | None = None
    kl_bound: float
    perplexity_bound: float

    @property
    def passed(self) -> bool:
        """Whether both bounds hold: of the divergence, and of perplexity over the checkpoint's less two
        standard errors, which few positions may be over by chance."""
        ratio = self.perplexity / self.original_perplexity - 2 * self.ratio_error
        return self.kl <= self.kl_bound and (not self.text or ratio <= self.perplexity_bound)


class Validation(Frozen):
    """Result of the last validation: worst error over max |logit|, share of equal top-1, and worst_ratio, the
    largest of all errors over their bounds, which is at most 1 where none is broken.

    These are of the graph, against PyTorch with the same weights; quality is of the weights.
    """

    passed: bool
    date: str
    cases: PositiveInt
    max_relative_error: float
    worst_ratio: float
    top1_agreement: float
    quality: Quality | None = None


class Requires(Frozen):
    """What the bundle needs of a machine. cpu: instruction sets, as /proc/cpuinfo of Linux names them;
    onnxruntime: the least version of ONNX Runtime that runs every graph."""

    cpu: tuple[str, ...] = ()
    onnxruntime: Version | None = None


class Manifest(Frozen):
    """`manifest.json`. Unknown keys are errors; another format version is refused. kept_fp32: modules of
    fp16 whose products stay in fp32, and the largest magnitude seen in the input or result of each."""

    format_version: Literal[5] = FORMAT_VERSION
    source: CheckpointSource
    model: ModelSpec
    target: Target
    precision: Precision
    quantization: Quantization | None = None
    kept_fp32: dict[str, float] = Field(default_factory=dict)
    requires: Requires = Requires()
    tools: dict[str, str]
    graphs: dict[str, GraphEntry]
    weights: Weights
    calling: Calling
    files: tuple[File, ...]
    validation: Validation | None = None

    @model_validator(mode="after")
    def _graphs_fit_the_model(self) -> Manifest:
        for name, graph in self.graphs.items():
            if graph.inputs != input_ports(self.model, graph.shape) or graph.outputs != output_ports(
                self.model, graph.shape
            ):
                raise ValueError(f"inputs or outputs of graph {name} do not fit the model it is for")
            if sorted((alias.output, alias.input) for alias in graph.aliases) != _pairs(graph):
                raise ValueError(f"aliases of graph {name} are not its keys and values")
        return self

    def graph(self, role: str) -> GraphEntry | None:
        """The graph of a role, or None; of two prefills the one of int8 activations."""
        return max(self.all_of(role), key=lambda graph: graph.shape.int8_activations, default=None)

    def all_of(self, role: str) -> list[GraphEntry]:
        """Every graph of a role: they take the same inputs and differ in how products are computed."""
        return [graph for graph in self.graphs.values() if graph.shape.role == role]

    def all_files(self) -> list[File]:
        return [*(graph.file for graph in self.graphs.values()), self.weights.file, *self.files]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def _pairs(graph: GraphEntry) -> list[tuple[str, str]]:
    """(output, input) of each key and value that a graph takes and gives, sorted."""
    cached = [port for port in graph.inputs if port.role in ("key", "value")]
    given = {f"{port.role} {port.layer}": port.name for port in graph.outputs}
    return sorted((given[f"{port.role} {port.layer}"], port.name) for port in cached)


def read(bundle: Path) -> Manifest:
    """Read and check a bundle's manifest. Raises StillgraphError."""
    path = bundle / MANIFEST
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no such folder" if not bundle.is_dir() else f"the folder has no {MANIFEST}"
        raise StillgraphError(
            "load bundle", f"{bundle}: {what}", "name a folder made by 'stillgraph export'"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} is not JSON ({first_line(error)})"
        raise StillgraphError("load bundle", problem, "export the bundle again") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise _other_version(path, raw, version)
    try:
        return Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problem = f"{path}: {wrong_field(error, 'manifest')}"
        raise StillgraphError("load bundle", problem, "export the bundle again") from error


def _other_version(path: Path, raw: Any, version: object) -> StillgraphError:
    """Why a manifest of another format is refused, and what to do."""
    problem = f"{path} has format version {version!r} and this stillgraph understands {FORMAT_VERSION}"
    if type(version) is not int or version < 1:
        return StillgraphError("load bundle", problem, "export the bundle again")
    if version > FORMAT_VERSION:
        return StillgraphError("load bundle", problem, "upgrade with 'pip install --upgrade stillgraph'")
    # In backticks, since a path with a space has quotes of its own.
    again = f"make it anew with `{remaking_command(raw, path.parent)}`"
    return StillgraphError("load bundle", problem, again)


def json_schema() -> str:
    """The manifest's JSON Schema, as published in `runtime/manifest.schema.json`."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"
