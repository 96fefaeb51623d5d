"""The bundles that a benchmark makes of the same checkpoint, by name.

    dynamic   portable   portable-fp16   onnxruntime-int8   onnxruntime-int4-b32-fast+compiled+unload

A name is a target, a precision where it is not fp32, a block size where it is not the default, `fast` for
`--fast-prefill`; then how it is run: `+compiled` by 'stillgraph compile', `+unload` with `--unload-prefill`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from stillgraph.compiled import find
from stillgraph.exporter.bench.contender import Contender, ContenderSource, Making
from stillgraph.exporter.calibration import NONE
from stillgraph.exporter.few_bits import few_bits
from stillgraph.exporter.precisions import CALIBRATED, QUANTIZED
from stillgraph.exporter.targets import TARGETS
from stillgraph.manifest import FORMAT_VERSION, MANIFEST, Manifest

NAME = re.compile(
    r"(?P<target>dynamic|portable|onnxruntime)(-(?P<precision>fp16|int8|int4))?(-b(?P<block>32|64|128))?"
    r"(?P<fast>-fast)?(?P<run>(\+compiled|\+unload)*)"
)
OURS = Path(__file__).parent / "contenders" / "stillgraph_bundle.py"


def form(name: str, source: ContenderSource) -> Contender | None:
    """The contender of a name, made from the checkpoint into `source.models`; None for no such form."""
    match = NAME.fullmatch(name)
    if match is None or not _allowed(match):
        return None
    base = name.partition("+")[0]
    bundle = source.models / f"{base}-{source.max_len}-{source.ctx}-format{FORMAT_VERSION}"
    what = ["dynamic"] if match["target"] == "dynamic" else ["bundle", "--target", match["target"]]
    command = [*_stillgraph("export"), *what, "--model", source.checkpoint, "--ctx", str(source.ctx)]
    command += ["--precision", match["precision"]] if match["precision"] else []
    command += ["--calibrate", NONE] if match["precision"] == CALIBRATED else []  # which changes no time
    command += ["--block-size", match["block"]] if match["block"] else []
    command += ["--fast-prefill"] if match["fast"] else []
    if what[0] == "bundle":
        command += ["--max-len", str(min(source.max_len, source.ctx)), "--no-validate"]
    command += ["--quiet", "--out", str(bundle)]
    return as_contender(name, bundle, (Making(bundle / MANIFEST, tuple(command)),))


def _allowed(match: re.Match[str]) -> bool:
    target, precision = match["target"], match["precision"]
    if precision and (target not in TARGETS or precision not in TARGETS[target].precisions):
        return False
    if (match["block"] or match["fast"]) and precision not in QUANTIZED:
        return False
    fused = bool(match["fast"]) or "+compiled" in match["run"]
    own_ops = target in TARGETS and TARGETS[target].own_ops
    return not (fused and not own_ops) and not (match["run"] and target == "dynamic")


def as_contender(name: str, bundle: Path, prepare: tuple[Making, ...] = ()) -> Contender:
    """A bundle, run as the words after a + in its name say."""
    words = set(name.split("+")[1:])
    if "compiled" in words:
        made = bundle / "compiled"
        prepare = (*prepare, Making(made, (*_stillgraph("compile"), "--quiet", str(bundle))))
    how = [word for word, said in (("compiled", "compiled"), ("--unload-prefill", "unload")) if said in words]
    return Contender(
        name=name,
        label=", ".join([f"Stillgraph {name.partition('+')[0].replace('-', ' ')}", *how]),
        group="stillgraph",
        file=OURS,
        model=str(bundle),
        options={"compiled": str("compiled" in words), "unload": str("unload" in words)},
        prepare=prepare,
        exact=not re.search(r"-(fp16|int8|int4)", name),
        sees=True,
    )


def subject(bundle: Path, manifest: Manifest) -> Contender:
    """The bundle that the user named, as `load` would run it: compiled where that fits."""
    compiled = find(bundle, manifest).compiled is not None
    found = as_contender(base_name(manifest) + ("+compiled" if compiled else ""), bundle)
    return replace(found, prepare=(), exact=manifest.precision == "fp32")


def base_name(manifest: Manifest) -> str:
    """What the form of a bundle is called, less how it is run."""
    if manifest.graph("dynamic") is not None:
        return "dynamic"
    words = [manifest.target, "" if manifest.precision == "fp32" else manifest.precision]
    if form := manifest.quantization:
        usual = few_bits(manifest.precision, None, None, (), NONE, None)
        words += [
            f"b{form.block_size}" if form.block_size != usual.block_size else "",
            "fast" if form.fast_prefill else "",
        ]
        points = "symmetric" if form.symmetric else "asymmetric"
        words += [
            points if form.symmetric != usual.symmetric else "",
            "kept" if form.keep != usual.keep else "",
        ]
    return "-".join(word for word in words if word)


def _stillgraph(command: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "stillgraph", command)
