"""Bind a validation to the files of a bundle and of its checkpoint, and write that as JSON and as a page."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stillgraph.certificate import STAGE, Certificate, Content, Place, Verdict, bundle_files, bundle_identity
from stillgraph.cpu import cpu_name, present_flags
from stillgraph.errors import CheckFailed
from stillgraph.exporter.checkpoint_folder import NEEDED, folder_of
from stillgraph.exporter.config import Say
from stillgraph.exporter.prove.page import write_page
from stillgraph.exporter.staging import staged_file
from stillgraph.exporter.validate.cases import Depth
from stillgraph.exporter.validate.gates import Check
from stillgraph.exporter.validate.report import Parity
from stillgraph.exporter.validate.validate import validate
from stillgraph.files import check_files, describe
from stillgraph.manifest import MANIFEST, File, read

TOOLS = ("stillgraph", "torch", "transformers", "onnx", "onnxruntime")


class Proven(NamedTuple):
    """A certificate, where it is, and the validation in it."""

    place: Place
    certificate: Certificate
    parity: Parity


def prove_bundle(bundle: Path, *, model: str | None = None, depth: Depth = "default", say: Say) -> Proven:
    """Validate a bundle, and certify that of the files that are in it.

    Arguments as of `validate`. Raises StillgraphError for bad input, and for files that are not those that
    the manifest was written for; CheckFailed where files change meanwhile. A broken bound is a certificate of
    it.
    """
    before = read(bundle)
    say("hashing the bundle")
    check_files(bundle, before, hashes=True)
    parity = validate(bundle, model=model, depth=depth, say=say)
    say("hashing bundle and checkpoint")
    manifest = read(bundle)
    place = Place.of(bundle)
    own = {path.relative_to(bundle).as_posix() for path in (place.certificate, place.page)}
    files = [describe(bundle, bundle / path) for path in bundle_files(bundle) if path not in own]
    if changed := {*before.all_files()} - {*files}:
        names = ", ".join(sorted(file.path for file in changed))
        raise CheckFailed(STAGE, f"{names} changed while {bundle} was proven", "prove it again")
    content = Content(
        subject="bundle",
        identity=bundle_identity(json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))),
        findings=found_of(parity),
        **common(parity, model or manifest.source.id),
        files=tuple(files),
    )
    return write(place, content, parity)


def found_of(parity: Parity) -> tuple[str, ...]:
    """The result of a validation in a sentence."""
    if problem := parity.problem():
        return (f"{problem[0].upper()}{problem[1:]}.",)
    return (
        f"All bounds hold in {len(parity.cases)} cases: the largest error over its bound is"
        f" {parity.worst_ratio:.2g}, top-1 agreement {parity.top1_agreement:.2%}.",
    )


def common(parity: Parity, model: str) -> dict[str, Any]:
    """What certificates of bundles and of graphs have in common."""
    versions = {name: importlib.metadata.version(name) for name in TOOLS}
    folder = folder_of(model)
    return {
        "date": parity.date,
        "passed": parity.passed,
        "verdicts": verdicts(parity),
        "versions": versions | {"python": platform.python_version()},
        "cpu": cpu_name(),
        "cpu_flags": tuple(present_flags()),
        "checkpoint": model,
        "checkpoint_files": tuple(checkpoint_files(folder)),
        "report": json.loads(parity.model_dump_json()),
    }


def checkpoint_files(folder: Path) -> Iterator[File]:
    """What transformers may read of a checkpoint."""
    found = {path.name for pattern in NEEDED for path in folder.glob(pattern) if path.is_file()}
    for name in sorted(found):
        yield describe(folder, folder / name)


def write(place: Place, content: Content, parity: Parity) -> Proven:
    """The page, and the certificate with the page's hash among those of the files."""
    staged_file(place.page, write_page(content, parity))
    page = describe(place.root, place.page)
    files = sorted((*content.files, page), key=lambda file: file.path)
    certificate = Certificate.of(content.model_copy(update={"files": tuple(files)}))
    staged_file(place.certificate, certificate.to_json())
    return Proven(place, certificate, parity)


def verdicts(parity: Parity) -> tuple[Verdict, ...]:
    """Of each kind of bound, the worst first."""
    kinds: dict[tuple[str, str], list[tuple[str, Check]]] = {}
    for title, check in parity.checks:
        kinds.setdefault((check.what, check.measure), []).append((title, check))
    found = [_verdict(checks) for checks in kinds.values()]
    if (quality := parity.quality) is not None:
        found.append(
            Verdict(
                of="quantized weights",
                measure="mean KL",
                value=quality.kl,
                bound=quality.kl_bound,
                broken=int(not quality.passed),
                where=f"against the checkpoint's own weights, {quality.positions} positions",
            )
        )
    return tuple(found)


def _verdict(checks: Sequence[tuple[str, Check]]) -> Verdict:
    """Of checks of one kind, the worst of which comes first."""
    title, worst = checks[0]
    places = [("layer", worst.layer), ("position", worst.position), ("row", worst.row or None)]
    return Verdict(
        of=worst.what,
        measure=worst.measure,
        value=worst.value,
        bound=worst.bound,
        broken=sum(not check.holds for _, check in checks),
        where=", ".join([title, *(f"{name} {number}" for name, number in places if number is not None)]),
    )
