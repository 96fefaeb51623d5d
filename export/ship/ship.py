"""Ship a bundle: a folder for one runtime, proven by its own driver, and the folder's archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillgraph.archive import pack
from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.bundle.build import carry_over
from stillgraph.exporter.config import Say
from stillgraph.exporter.ship.cache_write import rewrite_cache_write
from stillgraph.exporter.ship.check import Checked, check
from stillgraph.exporter.ship.runtimes import STAGE, Runtime
from stillgraph.exporter.staging import staged
from stillgraph.files import check_files
from stillgraph.golden import GOLDEN
from stillgraph.manifest import MANIFEST, Manifest, read

README = """# {model} for {title}

{precision}, prefill of {chunk} tokens, cache of {ctx} slots; made by `stillgraph ship --for {name}`.
manifest.json says what each file is and how the graphs are called; golden.json has prompts, and
what PyTorch makes of them.

{use}"""


@dataclass(frozen=True)
class Shipped:
    """Where it is, and what came of golden.json."""

    folder: Path
    archive: Path
    checked: Checked


def ship(bundle: Path, runtime: Runtime, out: Path | None, say: Say) -> Shipped:
    """Ship a bundle for a runtime, by default into a folder beside the bundle.

    Raises StillgraphError for a bundle that cannot be shipped so, and CheckFailed where the driver makes
    another text or other logits than golden.json says; what was at the place before is then as it was.
    """
    manifest = read(bundle)
    check_files(bundle, manifest)
    if GOLDEN not in {file.path for file in manifest.files}:
        raise StillgraphError(STAGE, f"{bundle} has no {GOLDEN}", "run 'stillgraph validate' on it")
    if reason := runtime.refuses(manifest):
        raise StillgraphError(
            STAGE, f"{bundle} cannot be shipped for {runtime.title}: {reason}", "export another"
        )
    place = out or bundle.resolve().with_name(f"{bundle.resolve().name}-{runtime.name}")
    with staged(place) as folder:
        say(f"writing the files for {runtime.title}")
        shipped = _fill(bundle, folder, runtime, manifest, say)
        say(f"golden.json through {runtime.title}")
        checked = check(runtime, folder)
        if checked.problems:
            problem = f"{runtime.title} differs from golden.json: {'; '.join(checked.problems)}"
            raise CheckFailed(STAGE, problem, "do not use it; the bundle is as it was")
        if shipped != read(folder):
            raise CheckFailed(STAGE, "the driver changed the manifest", "report this bug")
    archive = place.with_name(f"{place.name}.tar")
    say(f"writing {archive.name}")
    pack(place, archive, runtime.name)
    return Shipped(place, archive, checked)


def _fill(bundle: Path, folder: Path, runtime: Runtime, manifest: Manifest, say: Say) -> Manifest:
    files = tuple(file for file in manifest.files if not file.path.startswith("reports/"))
    carried = manifest.model_copy(update={"files": files})
    carry_over(bundle, folder, carried)
    carried = rewrite_cache_write(folder, carried, runtime.cache_write)
    carried = runtime.fill(folder, carried, say)
    (folder / MANIFEST).write_text(carried.to_json(), encoding="utf-8")
    runtime.copy_driver(folder)
    written = folder / "README.md"
    use = written.read_text(encoding="utf-8") if written.is_file() else ""
    assert carried.calling.prompt is not None
    decode = carried.graph("decode")
    said = README.format(
        model=Path(carried.source.id).name,
        title=runtime.title,
        name=runtime.name,
        precision=carried.precision,
        chunk=carried.calling.prompt.chunk,
        ctx=decode.shape.ctx if decode else 0,
        use=use,
    )
    written.write_text(said, encoding="utf-8")
    return carried
