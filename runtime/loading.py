"""Open a bundle: check it, choose its plain or its compiled graphs, and load what memory may hold."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnxruntime as ort

from stillgraph.compiled import Compiled, CompiledGraph, Found, find, set_options
from stillgraph.cpu import cpu_name, lacking
from stillgraph.dynamic import GrowingGraph
from stillgraph.engine import Engine
from stillgraph.errors import StillgraphError
from stillgraph.files import check_files
from stillgraph.kv_cache import GraphPair, Graphs
from stillgraph.manifest import GraphEntry, Manifest, read
from stillgraph.page_cache import mappings, populate
from stillgraph.session import Session
from stillgraph.session_options import Provider, SessionChoice
from stillgraph.session_options import session_options as make_options
from stillgraph.tokenizer import Text
from stillgraph.vision.embedder import Embedder
from stillgraph.vision.features import Vision

if TYPE_CHECKING:
    from stillgraph.vision.preprocessor import Preprocessor

Load = Callable[[GraphEntry], Session]
log = logging.getLogger("stillgraph")


def load(
    bundle: str | Path,
    *,
    unload_prefill: bool | None = None,
    threads: int | None = None,
    check_hashes: bool = False,
    compiled: bool = True,
    profile: Path | None = None,
    providers: Sequence[Provider] | None = None,
    session_options: Mapping[str, Any] | None = None,
    backend: str = "onnxruntime",
) -> Engine:
    """Load a bundle, ready for a prompt. Raises StillgraphError. `with` or `close` gives its memory back.

    unload_prefill: hold one graph at a time in memory; None asks the environment for
    UNLOAD_PREFILL_BEFORE_DECODE=1. threads: None for all cores this process may use. check_hashes: compare
    every file's hash with the manifest's; else its page sums alone (`page_cache.read_in`), which takes a
    tenth of a second a GB and sees all damage but what was made to be missed. compiled: False to ignore what
    'stillgraph compile' made. profile: a folder for ONNX Runtime's trace of each graph, `prefill_*.json` and
    `decode_*.json`, written when the graph is unloaded; runs are slower by some microseconds a node.

    providers: of ONNX Runtime, by name or as (name, options), the preferred one first; by default the CPU's.
    Validation covers the CPU's provider alone. Any other reads keys and values from one set of buffers in
    the CPU's memory and writes them to another, since nothing shows that it may write where it reads; bundles
    of the onnxruntime target, whose ops are the CPU's, are refused, and a compiled folder is left alone.
    session_options: of every graph's session, over those that this runtime sets: config entries such as
    {"session.intra_op.allow_spinning": "0"}, and attributes of ONNX Runtime's SessionOptions such as
    {"intra_op_num_threads": 2}. Those that exact sums and mapped weights depend on are refused. A compiled
    graph is optimized already, whatever `graph_optimization_level` says. backend: `openvino` runs portable
    static graphs in OpenVINO on the CPU.

    What 'stillgraph compile' made for this machine is used where it fits; where it does not, a warning says
    why, and the bundle's own graphs serve. A bundle of one growing graph has no prefill to unload.
    """
    began = time.perf_counter()
    chosen = SessionChoice.of(threads, providers, session_options, backend, profile)
    if not isinstance(bundle, str | os.PathLike):
        problem = f"a bundle was given as {type(bundle).__name__}"
        raise StillgraphError("load bundle", problem, "give the path of its folder")
    folder = Path(bundle)
    manifest = read(folder)
    check_files(folder, manifest, hashes=check_hashes, sums=True)
    _check_machine(folder, manifest, chosen)
    one = os.environ.get("UNLOAD_PREFILL_BEFORE_DECODE") == "1" if unload_prefill is None else unload_prefill
    text = Text(folder, manifest.calling.tokens.bos) if (folder / "tokenizer.json").is_file() else None
    found = find(folder, manifest, hashes=check_hashes) if compiled and chosen.on_cpu else Found(None)
    if found.reason:
        log.warning(found.reason)
    open_graph = _loader(folder, manifest, found.compiled, chosen, one)
    pair = None if manifest.graph("dynamic") else _pair(folder, manifest, found.compiled)
    vision = _vision(folder, manifest, open_graph, one)
    if pair is not None and not chosen.on_cpu:
        pair = _apart(pair[0]), _apart(pair[1])
    try:
        graphs = _graphs(folder, manifest, pair, open_graph, one, vision)
    except MemoryError as error:
        problem = f"there is no memory for the cache and the buffers of {folder}"
        raise StillgraphError("load bundle", problem, "export it with a smaller --ctx or --batch") from error
    graphs.load_seconds = time.perf_counter() - began - (vision.load_seconds if vision else 0.0)
    return Engine(manifest, graphs, text, folder, vision)


def _graphs(
    folder: Path,
    manifest: Manifest,
    pair: tuple[GraphEntry, GraphEntry] | None,
    open_graph: Load,
    one_at_a_time: bool,
    vision: Vision | None,
) -> Graphs:
    """The graphs of a growing cache, or of a static one. pair: the prefill and the decode of the latter."""
    if pair is None:
        return GrowingGraph(_entry(folder, manifest, "dynamic"), open_graph)
    pad = manifest.calling.tokens.pad
    embedder = None
    if pair[0].shape.embeds and vision:
        embed = _entry(folder, manifest, "embed")
        embedder = Embedder(embed, open_graph, vision.fill, vision.spec.image_tokens, pad)
    return GraphPair(*pair, manifest.model.layers, open_graph, one_at_a_time, embedder, pad)


def _check_machine(folder: Path, manifest: Manifest, chosen: SessionChoice) -> None:
    """Refuse a CPU, an ONNX Runtime or providers that the bundle cannot run on. Raises StillgraphError."""
    needed = manifest.requires
    if missing := lacking(needed.cpu):
        problem = f"{folder} needs {', '.join(missing)}, which this CPU, {cpu_name()}, does not have"
        raise StillgraphError("load bundle", problem, "export the bundle again, or run it on another machine")
    if needed.onnxruntime is not None and _numbers(ort.__version__) < _numbers(needed.onnxruntime):
        problem = f"{folder} needs onnxruntime {needed.onnxruntime} or newer and this is {ort.__version__}"
        raise StillgraphError("load bundle", problem, "upgrade with 'pip install --upgrade onnxruntime'")
    if not chosen.on_cpu and manifest.target == "onnxruntime":
        other = "providers has others" if chosen.backend == "onnxruntime" else f"backend is {chosen.backend}"
        problem = f"{folder} is made of ops of ONNX Runtime's CPU provider, and {other}"
        raise StillgraphError("load bundle", problem, "leave that out, or export with --target portable")
    if chosen.backend != "onnxruntime" and manifest.graph("dynamic"):
        problem = f"{folder} has a growing cache, and backend is {chosen.backend}"
        raise StillgraphError("load bundle", problem, "leave that out, or use a bundle of static graphs")


def _vision(folder: Path, manifest: Manifest, open_graph: Load, one_at_a_time: bool) -> Vision | None:
    """What sees the pictures of a model that takes some. Pillow is imported when the first one comes."""
    spec, images = manifest.model.vision, manifest.calling.images

    def preprocessor() -> Preprocessor:
        try:
            from stillgraph.vision.preprocessor import Preprocessor
        except ImportError as error:
            problem = f"images need Pillow ({error})"
            raise StillgraphError("read image", problem, "pip install 'stillgraph[vision]'") from error
        if images is None:
            problem = f"{folder} does not say how its model is given images"
            remedy = "export it again, from a checkpoint with a preprocessor_config.json"
            raise StillgraphError("read image", problem, remedy)
        return Preprocessor.model_validate(images.model_dump())

    if spec is None:
        return None
    return Vision(spec, manifest.graph("vision"), preprocessor, open_graph, one_at_a_time)


def _loader(
    folder: Path,
    manifest: Manifest,
    compiled: Compiled | None,
    chosen: SessionChoice,
    one_at_a_time: bool,
) -> Load:
    if chosen.backend == "openvino":
        from stillgraph.openvino_graph import OpenVinoGraph

        # No growing graph comes here, which would call it otherwise.
        return cast(Load, lambda entry: OpenVinoGraph(folder / entry.file.path, entry, chosen.threads))
    weights = folder / manifest.weights.file.path

    def session(entry: GraphEntry, made: CompiledGraph | None) -> Session:
        pack = compiled.packed if made and compiled else manifest.precision != "fp32"
        options, file = make_options(entry, pack, chosen, one_at_a_time), entry.file
        if made:
            set_options(options, folder, pack)
            file = made.file
        if chosen.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(chosen.profile / entry.shape.role)
        former = mappings(weights)  # of the other graph, populated when that was loaded
        opened = Session(folder / file.path, entry, options, chosen.providers)
        if not pack:  # else there are copies, or packing has read every page
            populate(mappings(weights) - former)
        return opened

    def open_graph(entry: GraphEntry) -> Session:
        if compiled and (made := compiled.graph(entry)):
            try:
                return session(entry, made)
            except StillgraphError as error:  # of ONNX Runtime: what was compiled is only there to be faster
                log.warning("The bundle's own graph is used: %s", error)
        return session(entry, None)

    return open_graph


def _pair(folder: Path, manifest: Manifest, compiled: Compiled | None) -> tuple[GraphEntry, GraphEntry]:
    """The prefill and the decode, which share a cache; of two prefills the one that was compiled."""
    prefill, decode = _entry(folder, manifest, "prefill"), _entry(folder, manifest, "decode")
    prefill = (compiled.choice(manifest, "prefill") if compiled else None) or prefill
    if prefill.shape.ctx not in (None, decode.shape.ctx):
        problem = f"{folder} has a prefill of ctx {prefill.shape.ctx} and a decode of ctx {decode.shape.ctx}"
        raise StillgraphError("load bundle", problem, "export both with one --ctx")
    if prefill.shape.batch != decode.shape.batch:
        problem = f"{folder} has a prefill of {prefill.shape.batch} rows and a decode of {decode.shape.batch}"
        raise StillgraphError("load bundle", problem, "export both with one --batch")
    return prefill, decode


def _apart(entry: GraphEntry) -> GraphEntry:
    """A graph of whose presents none may lie in its past's buffer."""
    aliases = tuple(alias.model_copy(update={"same_buffer": False}) for alias in entry.aliases)
    return entry.model_copy(update={"aliases": aliases})


def _entry(folder: Path, manifest: Manifest, role: str) -> GraphEntry:
    entry = manifest.graph(role)
    if entry is None:
        remedy = f"add one with 'stillgraph export {role}' into the same --out"
        raise StillgraphError("load bundle", f"{folder} has no {role} graph", remedy)
    return entry


def _numbers(version: str) -> list[int]:
    """Of 1.32.0 the first two: what comes behind them is not always a number."""
    return [int(part) for part in version.split(".")[:2]]
