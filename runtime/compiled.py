"""A compiled folder, `BUNDLE/compiled/<cpu>/`: what it holds, and whether it fits this machine and bundle.

It holds what a session would otherwise make at every start: each graph as ONNX Runtime optimized it and,
where weights are packed for the CPU, one file of packed weights that every graph maps. `stillgraph compile`
writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, ValidationError

from stillgraph.cpu import cpu_name
from stillgraph.errors import wrong_field
from stillgraph.files import damage, sha256
from stillgraph.manifest import File, GraphEntry, Manifest
from stillgraph.spec import Frozen

if TYPE_CHECKING:  # the commands that only look at a bundle do not wait for ONNX Runtime
    import onnxruntime as ort

COMPILED = "compiled"
DESCRIPTION = "compiled.json"
FORMAT_VERSION: Literal[3] = 3
Form = Literal["fp32", "blocks", "channels"]  # of a product: see export/compile/kernel_choice.py
AGAIN = "run 'stillgraph compile' to make it again"


class CompiledGraph(Frozen):
    """One graph: the bundle's file that it was made from, its own file, and the largest relative difference
    between the outputs of the two that was seen."""

    source: File
    file: File
    worst_difference: float


class ProductTime(Frozen):
    """The median time of one product of `rows` tokens in a form, in milliseconds, when it was compiled."""

    form: Form
    rows: PositiveInt
    ms: float


class Products(Frozen):
    """The timed products: of matrices of `shape` [N, K], the largest of a layer; the form of each graph;
    and in a sentence what would be faster and is not in the bundle."""

    shape: tuple[PositiveInt, PositiveInt]
    times: tuple[ProductTime, ...]
    chosen: dict[str, Form]
    advice: str | None = None


class Compiled(Frozen):
    """`compiled.json`. Paths are relative to the bundle, as are those inside the graphs.

    cpu, onnxruntime: what it is for. packed: whether weights are packed; else the graphs read `weights`, the
    bundle's own file, as it is. data: the file of packed weights; None where nothing had to go into it.
    products: what was timed, and chosen by it; of two graphs of one role only the chosen one is compiled.
    """

    format_version: Literal[3] = FORMAT_VERSION
    cpu: str
    onnxruntime: str
    packed: bool
    weights: File
    graphs: tuple[CompiledGraph, ...]
    data: File | None
    products: Products | None = None

    def graph(self, entry: GraphEntry) -> CompiledGraph | None:
        """What was made of a graph of the bundle, or None."""
        return next((graph for graph in self.graphs if graph.source == entry.file), None)

    def choice(self, manifest: Manifest, role: str) -> GraphEntry | None:
        """The graph of a role that was compiled, or None."""
        return next((entry for entry in manifest.all_of(role) if self.graph(entry)), None)

    def files(self) -> list[File]:
        return [*(graph.file for graph in self.graphs), *([self.data] if self.data else [])]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class Found:
    """A bundle's compiled folder for this machine. reason: why one that is there is not used, in a sentence;
    None where it is used, and where there is none."""

    compiled: Compiled | None
    reason: str | None = None


def find(bundle: Path, manifest: Manifest, hashes: bool = False) -> Found:
    """The compiled folder that fits this CPU, this ONNX Runtime and these files of the bundle.

    Its description is checked against the hash beside the folder; sizes and page sums of its files are
    checked always, their hashes on request. Never raises because of what it finds.
    """
    cpu = cpu_name()
    folder = bundle / COMPILED / cpu
    if not folder.is_dir():
        others = [path.name for path in _folders(bundle / COMPILED)]
        if not others:
            return Found(None)
        why = f"it is for another CPU, and this one is {cpu}; run 'stillgraph compile' on this machine"
        return Found(None, f"{bundle / COMPILED / others[0]} is not used: {why}.")
    try:
        compiled = read(folder)
        problem = _misfit(compiled, manifest, cpu) or _damage(bundle, folder, compiled, hashes)
    except (OSError, ValueError, RecursionError) as error:  # ValidationError, JSONDecodeError: ValueErrors
        problem = f"its {DESCRIPTION} cannot be read ({_brief(error)})"
    if problem:
        return Found(None, f"{folder} is not used: {problem}; {AGAIN}.")
    return Found(compiled)


def seal(folder: Path) -> Path:
    """Where the hash of a compiled folder's description is: outside the folder."""
    return folder.with_name(f"{folder.name}.sha256")


def read(folder: Path) -> Compiled:
    """The description in a compiled folder. Raises OSError or ValueError."""
    raw = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r} where this stillgraph understands {FORMAT_VERSION}")
    return Compiled.model_validate_json(json.dumps(raw))


def set_options(options: ort.SessionOptions, bundle: Path, packed: bool) -> None:
    """Make the options of a plain graph's session those of a compiled one, whose paths start at the bundle.

    Nothing is left to optimize. Packed weights are found only by a session that packs: ONNX Runtime packs
    each weight again, compares, drops its own copy and reads the mapped one. So every page of them is mapped
    after a load, and of `weights` nothing needs to be but where weights are not packed.
    """
    import onnxruntime as ort

    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # ONNX Runtime takes no path that leaves this folder, so it cannot be the compiled one.
    _set(options, "session.model_external_initializers_file_folder_path", str(bundle))
    _set(options, "session.disable_prepacking", "0" if packed else "1")


def _set(options: ort.SessionOptions, key: str, value: str) -> None:
    """Set an entry unless it is so already: ONNX Runtime warns of every entry that is set twice."""
    try:
        if options.get_session_config_entry(key) == value:
            return
    except RuntimeError:  # not set
        if value == "0":
            return
    options.add_session_config_entry(key, value)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if (path / DESCRIPTION).is_file())


def _misfit(compiled: Compiled, manifest: Manifest, cpu: str) -> str | None:
    """Why a folder is not for this machine and bundle, or None."""
    import onnxruntime as ort

    if compiled.cpu != cpu:
        return f"it was made on {compiled.cpu} and this is {cpu}"
    if compiled.onnxruntime != ort.__version__:
        return f"it was made by onnxruntime {compiled.onnxruntime} and this is {ort.__version__}"
    if compiled.weights != manifest.weights.file:
        return "the bundle's weights have changed since"
    roles = {entry.shape.role for entry in manifest.graphs.values()}
    missing = [role for role in sorted(roles) if compiled.choice(manifest, role) is None]
    return f"the {missing[0]} graph was added or changed since" if missing else None


def _damage(bundle: Path, folder: Path, compiled: Compiled, hashes: bool) -> str | None:
    """What is wrong with the files, or None."""
    if seal(folder).read_text(encoding="ascii").strip() != sha256(folder / DESCRIPTION):
        return f"{DESCRIPTION} is damaged: it does not have the hash in {seal(folder).name}"
    found = (damage(bundle, file, hashes, sums=True) for file in compiled.files())
    return next((problem for problem in found if problem), None)


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return wrong_field(error, "all of it")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
