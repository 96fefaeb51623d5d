"""Do once, for this machine, what ONNX Runtime would do at every start: optimize the graphs and pack weights.

The result lies in `BUNDLE/compiled/<cpu>/`. Its description is written last and in one step, and no file that
the previous one names is touched before that: an interrupted compile leaves the previous result, or none.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from stillgraph.compiled import (
    COMPILED,
    DESCRIPTION,
    Compiled,
    CompiledGraph,
    Products,
    read,
    seal,
    set_options,
)
from stillgraph.cpu import available_cores, cpu_name
from stillgraph.errors import CheckFailed, StillgraphError, first_line
from stillgraph.exporter.compile import kernel_choice
from stillgraph.exporter.compile.check import compare
from stillgraph.exporter.compile.prepacked import (
    PackedFile,
    Place,
    external,
    locate,
    pack_largest_first,
    take_in,
)
from stillgraph.exporter.ort import session_options
from stillgraph.exporter.staging import alone, staged_file
from stillgraph.files import check_files, describe, sha256
from stillgraph.manifest import File, GraphEntry, Manifest
from stillgraph.manifest import read as read_manifest

STAGE = "compile"
MIN_EXTERNAL = 1024  # bytes; smaller weights stay inside the graph's file
# Bytes that packing takes of the disk, by bytes of weights: each weight as it is and packed (int4 in blocks
# of 32 grows by half), in the file that stays and in the one that ONNX Runtime writes for the current graph.
DISK = 5
FULL = 1 << 20  # bytes free on a disk that is practically full
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One compile: of which bundle, into which folder, and whether weights are packed."""

    bundle: Path
    folder: Path
    manifest: Manifest
    pack: bool


def compile_bundle(bundle: Path, say: Say, pack_fp32: bool = False) -> Compiled:
    """Compile every graph of a bundle for this CPU and this ONNX Runtime; replaces a previous result.

    Weights are stored as the kernels pack them, except those of an fp32 bundle: both graphs can map these
    from the bundle's own file. pack_fp32 packs them too: a prefill becomes faster by a seventh, a load slower
    by seconds, and the result takes twice the weights' size on disk. Raises StillgraphError for bad input or
    a full disk, CheckFailed where a compiled graph does not compute what the bundle's does.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    if not manifest.graphs:
        raise StillgraphError(STAGE, f"{bundle} has no graph", "add one with 'stillgraph export bundle'")
    if grown := manifest.graph("dynamic"):
        problem = f"{bundle} has graph {grown.shape.name} of growing lengths, which is run as it is"
        raise StillgraphError(STAGE, problem, "compile a bundle of static graphs")
    pack = pack_fp32 or manifest.precision != "fp32"
    job = Job(bundle, bundle / COMPILED / cpu_name(), manifest, pack)
    with _disk_errors(job.folder), _claimed(job.folder):
        _check_space(job)
        compiled = _compile(job, say)
        staged_file(job.folder / DESCRIPTION, compiled.to_json())
        staged_file(seal(job.folder), sha256(job.folder / DESCRIPTION) + "\n")
    return compiled


def _compile(job: Job, say: Say) -> Compiled:
    products = _products(job, say)
    entries = [
        entry for name, entry in job.manifest.graphs.items() if not products or name in products.chosen
    ]
    with tempfile.TemporaryDirectory(dir=job.folder) as name:
        packed = PackedFile(Path(name) / "packed")
        models = [_prepare(job, entry, Path(name), packed, say) for entry in entries]
        data = _keep(job, packed.path, "packed", ".data") if packed.close() else None
    where = data.path if data else ""
    graphs = []
    for entry, model in zip(entries, models, strict=True):
        locate(model, lambda location: location or where)
        file = _write_graph(job, entry, model)
        say(f"checking {entry.shape.name} against the graph that is not compiled")
        worst = _rehearse(job, entry, file)
        graphs.append(CompiledGraph(source=entry.file, file=file, worst_difference=worst))
    return Compiled(
        cpu=job.folder.name,
        onnxruntime=ort.__version__,
        packed=job.pack,
        weights=job.manifest.weights.file,
        graphs=tuple(graphs),
        data=data,
        products=products,
    )


def _products(job: Job, say: Say) -> Products | None:
    """Time the forms of a product on this CPU, and choose by it; None where no matrix is large enough."""
    manifest = job.manifest
    graphs = manifest.all_of("prefill") + manifest.all_of("decode")
    if not graphs:
        return None
    graph = onnx.load(job.bundle / graphs[0].file.path, load_external_data=False).graph
    shape = kernel_choice.largest_product(graph, manifest.model.vocab_size)
    if shape is None:
        return None
    rows = sorted({entry.shape.max_len for entry in graphs})
    say(f"timing products of {shape[0]} by {shape[1]} weights")
    times = kernel_choice.time_products(manifest, shape, rows, available_cores())
    chosen = {
        entry.shape.name: kernel_choice.form_of(entry, manifest)
        for entry in kernel_choice.choose(manifest, times)
    }
    advice = kernel_choice.advice(manifest, times)
    return Products(shape=shape, times=tuple(times), chosen=chosen, advice=advice)


def _prepare(job: Job, entry: GraphEntry, folder: Path, packed: PackedFile, say: Say) -> onnx.ModelProto:
    """The optimized graph: each weight is in `packed`, at location "", or where the bundle has it."""
    say(f"optimizing {entry.shape.name}")
    work = folder / "graph"
    work.mkdir()
    model = _optimize(job, entry, work)
    if job.pack:
        say(f"sharing the packed weights of {entry.shape.name}")
        take_in(model, work, packed, job.bundle, stored_weights(job.bundle, entry))
        pack_largest_first(model.graph)
    else:
        parent = Path(entry.file.path).parent
        locate(model, lambda location: (parent / location).as_posix())
    shutil.rmtree(work)
    return model


def _optimize(job: Job, entry: GraphEntry, work: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime optimizes and saves it, in the folder `work`.

    With packing its weights are saved beside it, packed; else they stay where the bundle has them.
    """
    path, options = work / "graph.onnx", session_options()
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.disable_prepacking", "0" if job.pack else "1")
    if job.pack:
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        name = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{name}_file_name", "graph.data")
        options.add_session_config_entry(f"{name}_min_size_in_bytes", str(MIN_EXTERNAL))
    source = job.bundle / entry.file.path
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if shutil.disk_usage(work).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        problem = f"ONNX Runtime cannot optimize {source} ({first_line(error)})"
        raise StillgraphError(STAGE, problem, "check the bundle with 'stillgraph inspect'") from error
    return onnx.load(path, load_external_data=False)


def stored_weights(bundle: Path, entry: GraphEntry) -> dict[str, Place]:
    """Where the bundle has the weights of a graph, by name."""
    parent = Path(entry.file.path).parent
    places = {}
    for tensor in onnx.load(bundle / entry.file.path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = external(tensor)
            location = (parent / entries["location"]).as_posix()
            places[tensor.name] = location, int(entries["offset"]), int(entries["length"])
    return places


def _write_graph(job: Job, entry: GraphEntry, model: onnx.ModelProto) -> File:
    path = job.folder / "graph"
    path.write_bytes(model.SerializeToString())
    return _keep(job, path, entry.shape.name, ".onnx")


def _keep(job: Job, path: Path, name: str, suffix: str) -> File:
    """Give a finished file its place. Part of its hash is in its name: a previous file of another content
    keeps its own."""
    digest = sha256(path)
    final = path.replace(job.folder / f"{name}-{digest[:8]}{suffix}")
    return describe(job.bundle, final)


def _rehearse(job: Job, entry: GraphEntry, file: File) -> float:
    """Largest relative difference between the plain graph and the compiled one. Raises CheckFailed."""
    plain, compiled = session_options(), session_options()
    plain.add_session_config_entry("session.disable_prepacking", "0" if job.pack else "1")
    set_options(compiled, job.bundle, job.pack)
    variants = (job.bundle / entry.file.path, plain), (job.bundle / file.path, compiled)
    try:
        return compare(*variants, entry, job.manifest.model.vocab_size)
    except CheckFailed:
        raise
    except Exception as error:  # as above
        problem = f"ONNX Runtime cannot run compiled {entry.shape.name} ({first_line(error)})"
        raise CheckFailed(STAGE, problem, "please report this bug") from error


def _check_space(job: Job) -> None:
    needed = DISK * job.manifest.weights.file.nbytes if job.pack else 0
    if needed > (free := shutil.disk_usage(job.folder).free):
        problem = f"packing may take {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of disk space are free"
        raise StillgraphError(STAGE, problem, "free space and compile again")


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Lock a folder against another compile; before and after it has no file that its description lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    busy = StillgraphError(STAGE, f"another compile into {folder} is running", "wait for it")
    with alone(folder, busy):
        try:
            _clean(folder)
            yield
        finally:
            _clean(folder)
            if not any(folder.iterdir()):
                seal(folder).unlink(missing_ok=True)
            for empty in (folder, folder.parent):
                if not any(empty.iterdir()):
                    empty.rmdir()


def _clean(folder: Path) -> None:
    """Remove what the description in a folder does not name."""
    try:
        kept = {Path(file.path).name for file in read(folder).files()} | {DESCRIPTION}
    except (OSError, ValueError, RecursionError):
        kept = set()
    for path in list(folder.iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem, remedy = f"{folder}: {error.strerror or error}", "free space, or make the bundle writable"
        raise StillgraphError(STAGE, problem, f"{remedy}, and compile again") from error
