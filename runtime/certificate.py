"""A certificate: what was proven of which files, and whether these are still the same files.

`stillgraph prove` writes it; checking it takes no PyTorch. It has a hash of every file and one of its own
content, and no signature: who can change a bundle can write another certificate. Whoever keeps its hash in
another place can tell.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, ValidationError

from stillgraph.errors import StillgraphError, wrong_field
from stillgraph.files import sha256
from stillgraph.manifest import MANIFEST, File, Sha256
from stillgraph.spec import Frozen

STAGE = "prove"
FORMAT_VERSION: Literal[1] = 1
REPORTS = "reports"
SUFFIX, PAGE_SUFFIX = ".json", ".html"
# Made on each machine, before or after a proof, and no part of it.
OUTSIDE = ("compiled/", "reports/bench.")


class Verdict(Frozen):
    """One kind of bound over all cases: its nearest or furthest broken error, and how many are broken.

    of, measure: of `Check` in export/validate/gates.py; where: the case, layer and position in words.
    """

    of: str
    measure: str
    value: float
    bound: float
    broken: NonNegativeInt
    where: str


class Content(Frozen):
    """What a certificate says. files: relative to the bundle, or to the graph's folder, the page among them.

    subject: what was proven; identity: what tells it from others, the hash of the checkpoint among it;
    findings: what was found, in sentences; report: all of parity.json.
    """

    format_version: Literal[1] = FORMAT_VERSION
    subject: Literal["bundle", "graph"]
    identity: dict[str, str]
    date: str
    passed: bool
    findings: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    versions: dict[str, str]
    cpu: str
    cpu_flags: tuple[str, ...]
    checkpoint: str
    checkpoint_files: tuple[File, ...]
    files: tuple[File, ...]
    report: dict[str, Any]


class Certificate(Frozen):
    """The file: its content, and the hash of that as `canonical` writes it."""

    content: Content
    sha256: Sha256

    @classmethod
    def of(cls, content: Content) -> Certificate:
        return cls(content=content, sha256=content_hash(json.loads(content.model_dump_json())))

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


@dataclass(frozen=True)
class Place:
    """Where a certificate is. root: the folder that its paths start at; name: of both files, less suffix."""

    root: Path
    name: str

    @property
    def certificate(self) -> Path:
        return self.root / (self.name + SUFFIX)

    @property
    def page(self) -> Path:
        return self.root / (self.name + PAGE_SUFFIX)

    @classmethod
    def of(cls, subject: Path) -> Place:
        """Of a bundle's folder, in its reports; of a graph, beside it."""
        if subject.is_dir():
            return cls(subject, f"{REPORTS}/proof")
        return cls(subject.parent, f"{subject.stem}.proof")

    @classmethod
    def find(cls, subject: Path) -> Place:
        """As `of`, and of a folder that is no bundle that of its one certificate. Raises StillgraphError."""
        if not subject.exists():
            raise StillgraphError(STAGE, f"{subject}: no such file or folder", "name a bundle or a graph")
        place = cls.of(subject)
        if subject.is_dir() and not (subject / MANIFEST).is_file():
            beside = sorted([*subject.glob(f"*.proof{SUFFIX}"), *subject.glob(f"onnx/*.proof{SUFFIX}")])
            if len(beside) > 1:
                names = ", ".join(path.name for path in beside)
                raise StillgraphError(STAGE, f"{subject} has {names}", "name the graph of one of them")
            if beside:
                place = cls(beside[0].parent, beside[0].name.removesuffix(SUFFIX))
        if not place.certificate.is_file():
            problem = f"{place.certificate} is missing"
            raise StillgraphError(STAGE, problem, f"make it with 'stillgraph prove {subject}'")
        return place


def canonical(content: dict[str, Any]) -> bytes:
    """The content as it is hashed: keys sorted, no spaces, ASCII, numbers as Python writes them."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()


def read(place: Place) -> tuple[Certificate, str]:
    """A certificate, and the hash of its content as it is now. Raises StillgraphError."""
    path = place.certificate
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        found = content_hash(raw["content"])
        version = raw["content"].get("format_version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path} is not a certificate ({type(error).__name__})"
        raise StillgraphError(STAGE, problem, "copy it again, or make another one") from error
    if version != FORMAT_VERSION:
        problem = f"{path} has format version {version!r} and this stillgraph understands {FORMAT_VERSION}"
        raise StillgraphError(STAGE, problem, "check it with the stillgraph that made it")
    try:
        return Certificate.model_validate_json(json.dumps(raw)), found
    except ValidationError as error:
        problem = f"{path}: {wrong_field(error, '')}"
        raise StillgraphError(STAGE, problem, "copy it again, or make another one") from error


def differences(subject: Path, checkpoint: Path | None = None) -> tuple[Certificate, list[str]]:
    """The certificate of a bundle or a graph, and a line for each thing that is not as it says.

    checkpoint: a folder to compare with the files that the proof was made against. Raises StillgraphError
    where there is no certificate, and for one that cannot be read.
    """
    place = Place.find(subject)
    certificate, found = read(place)
    content, name = certificate.content, place.certificate.relative_to(place.root).as_posix()
    lines = []
    if found != certificate.sha256:
        lines.append(f"{name}: the hash of its content is {found}, and it says {certificate.sha256}")
    if not content.passed:
        broken = sum(verdict.broken for verdict in content.verdicts)
        lines.append(f"{name}: it certifies a failure: {broken} bounds were broken")
    if content.subject == "bundle":
        lines += _other_bundle(place.root, content.identity)
    lines += _changed(place.root, content.files)
    if content.subject == "bundle":
        listed = {file.path for file in content.files} | {name}
        lines += [
            f"{path}: not in the certificate" for path in bundle_files(place.root) if path not in listed
        ]
    if checkpoint is not None:
        lines += [f"checkpoint {line}" for line in _changed(checkpoint, content.checkpoint_files)]
    return certificate, lines


def bundle_files(bundle: Path) -> Iterator[str]:
    """Paths of all that lies in a bundle and can be proven, sorted; a link to a folder is one of them."""
    found = []
    for folder, folders, files in os.walk(bundle):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [(Path(folder) / name).relative_to(bundle).as_posix() for name in (*files, *links)]
    yield from sorted(path for path in found if not path.startswith(OUTSIDE))


def bundle_identity(manifest: dict[str, Any]) -> dict[str, str]:
    """What tells a bundle from others, of its manifest's JSON.

    Raises KeyError, TypeError or AttributeError for other JSON.
    """
    return {
        "checkpoint": manifest["source"]["checkpoint_sha256"],
        "target": manifest["target"],
        "precision": manifest["precision"],
        "graphs": ", ".join(sorted(manifest["graphs"])),
    }


def _other_bundle(bundle: Path, identity: dict[str, str]) -> list[str]:
    """A line where the certificate is of another bundle; that files have changed is said of each."""
    try:
        here = bundle_identity(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # the manifest's own line says that it is not what it was
    others = [f"{key} {identity.get(key)} (here {value})" for key, value in here.items()
              if identity.get(key) != value]  # fmt: skip
    return [f"the certificate is of another bundle: {', '.join(others)}"] if others else []


def _changed(root: Path, files: tuple[File, ...]) -> Iterator[str]:
    for file in files:
        path = root / file.path
        if not path.is_file():
            yield f"{file.path}: missing"
        elif (size := path.stat().st_size) != file.nbytes:
            yield f"{file.path}: {size} bytes where the certificate says {file.nbytes}"
        elif sha256(path) != file.sha256:
            yield f"{file.path}: as many bytes, and others"
