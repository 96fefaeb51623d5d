"""Who is compared: the bundle, and what `--against` names. Unequal comparisons are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.bench.contender import Contender, ContenderSource, others
from stillgraph.exporter.bench.variants import as_contender, base_name, form, subject
from stillgraph.manifest import MANIFEST, Manifest, read

STAGE = "bench"
GGUF = ".gguf"
ALL = (
    "torch",
    "torch-bf16",
    "dynamic",
    "portable",
    "portable+unload",
    "onnxruntime-int8",
    "onnxruntime-int8+compiled",
    "onnxruntime-int4",
    "onnxruntime-int4+compiled",
    "onnxruntime-int4-fast+compiled",
    "llama",
    "genai",
    "openvino",
)


@dataclass(frozen=True)
class Subject:
    """The bundle that a benchmark is of."""

    bundle: Path
    manifest: Manifest

    @property
    def ctx(self) -> int:
        return ctx_of(self.manifest)

    def source(self, work: Path, model: str | None, ctx: int) -> ContenderSource:
        """What to make the others from: `model`, or the checkpoint as it was named at the export."""
        source = self.manifest.source
        models = work / source.checkpoint_sha256[:12]
        name = model or source.id
        name = str(Path(name).resolve()) if Path(name).is_dir() else name
        prefill = self.manifest.graph("prefill")
        sizes = {"max_len": prefill.shape.max_len} if prefill else {}
        return ContenderSource(name, source.checkpoint_sha256, work.resolve(), models.resolve(), ctx, **sizes)


def open_subject(bundle: Path) -> Subject:
    """Raises StillgraphError where it is not a bundle that can be compared."""
    manifest = read(bundle)
    batch = {graph.shape.batch for graph in manifest.graphs.values()}
    if batch != {1}:
        problem = f"{bundle} has graphs of {max(batch, default=0)} rows, and others run one"
        raise StillgraphError(STAGE, problem, "export it with --batch 1")
    return Subject(bundle, manifest)


def lineup(found: Subject, source: ContenderSource, against: Sequence[str]) -> list[Contender]:
    """The contenders at `source.ctx`, the bundle first, each once. Raises StillgraphError."""
    chosen = [_subject_at(found, source)]
    words = [name for word in against for name in (ALL if word == "all" else (word,))]
    added = others(source) if words else []
    for word in words:
        named = [other for other in added if word in (other.name, other.group)]
        if not named and (ours := form(word, source)):
            named = [ours]
        if not named and word.endswith(GGUF) and Path(word).is_file():
            named = [_of_file(other, Path(word)) for other in added if other.model.endswith(GGUF)][:1]
        if not named and (Path(word) / MANIFEST).is_file():
            named = [_bundle(found, Path(word))]
        if not named and word in ALL:  # of a package that is not installed
            remedy = "not installed: pip install 'stillgraph[export]'"
            named = [Contender(word, word, word, Path(), "", missing=remedy)]
        if not named:
            known = ", ".join(["all", *ALL, *(other.name for other in added if other.name not in ALL)])
            raise StillgraphError(
                STAGE, f"--against {word!r} is not a contender", f"use a bundle, a GGUF file or {known}"
            )
        chosen += [contender for contender in named if contender.name not in {c.name for c in chosen}]
    return chosen


def _subject_at(found: Subject, source: ContenderSource) -> Contender:
    if source.ctx == found.ctx:
        return subject(found.bundle.resolve(), found.manifest)
    name = base_name(found.manifest)
    other = form(name, source)
    if other is None:
        problem = f"{found.bundle} has a ctx of {found.ctx}, and '{name}' cannot be made for {source.ctx}"
        raise StillgraphError(STAGE, problem, "leave out --sweep ctx, or export it with that --ctx")
    return other


def _of_file(made: Contender, file: Path) -> Contender:
    """llama.cpp with a GGUF file that is there, in place of one that it makes."""
    path = file.resolve()
    return replace(made, name=file.name, label=f"llama.cpp {file.stem}", model=str(path), prepare=())


def _bundle(found: Subject, bundle: Path) -> Contender:
    """Another bundle, if it is of the same checkpoint and sizes."""
    manifest = open_subject(bundle).manifest
    pairs = {
        "checkpoint": (
            manifest.source.checkpoint_sha256[:12],
            found.manifest.source.checkpoint_sha256[:12],
        ),
        "ctx": (ctx_of(manifest), found.ctx),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            problem = f"{bundle} has {name} {theirs} and {found.bundle} has {ours}"
            raise StillgraphError(STAGE, problem, "compare bundles of one checkpoint and one --ctx")
    contender = as_contender(bundle.name, bundle.resolve())
    return subject_named(contender, manifest)


def subject_named(contender: Contender, manifest: Manifest) -> Contender:
    """A bundle under its folder's name, run as `load` would run it."""
    like = subject(Path(contender.model), manifest)
    label = f"{like.label} ({contender.name})"
    return replace(like, name=contender.name, label=label, prepare=())


def ctx_of(manifest: Manifest) -> int:
    """Tokens that a bundle's cache can hold."""
    return max(graph.shape.limit for graph in manifest.graphs.values() if graph.shape.caches)
