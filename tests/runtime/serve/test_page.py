"""The page in a browser: tokens are golden.json's, it stops, and it needs no server the second time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillgraph.exporter.ship.browser import Browser, chromium
from stillgraph.exporter.ship.check import answer_of
from stillgraph.golden import compare, read
from stillgraph.loading import load
from stillgraph.manifest import read as read_manifest
from stillgraph.serve.packages import FILES, packages
from tests.export.ship.conftest import proven_copy
from tests.runtime.serve.serving import serving

pytestmark = pytest.mark.skipif(chromium() is None, reason="needs chromium")
UNFETCHED = "needs the page's packages, which .ci/run has npm fetch"
STATE = "document.body.dataset.state"
OFFLINE = "document.getElementById('offline')"
KEPT = f"{OFFLINE}.textContent.length > 1 && {OFFLINE}.textContent"  # a dash until all is kept, or is not
ASK = """document.getElementById("prompt").value = "hey", document.getElementById("form").requestSubmit()"""


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    return proven_copy(tiny_bundle(), tmp_path_factory.mktemp("page") / "tiny")


@pytest.fixture
def browser():
    if not packages():
        pytest.skip(UNFETCHED)
    with Browser("--incognito") as page:  # in memory: on a disk with little room files of 14 MB are not kept
        yield page


def test_golden_then_a_stop_then_no_server(browser, bundle) -> None:
    with serving(load(bundle, threads=1)) as server:
        browser.open(server.url)
        assert browser.until(STATE) == "ready"
        assert browser.value("crossOriginIsolated")
        browser.value("runGolden()")
        browser.until("globalThis.golden?.at(-1) === null")
        answers = {line["name"]: line for line in browser.value("golden")[:-1]}
        golden = read(bundle)
        for case in golden.cases:
            found = compare(case, answer_of(answers[case.name]), golden.tolerance)
            assert found.problems == ()
            assert found.steps > 0
        # Stopped before its first token is there: this cache is full within milliseconds.
        shown = "document.querySelector('.assistant')?.textContent"
        browser.value(f"{ASK}, document.getElementById('send').click()")
        browser.until(f"{STATE} === 'ready'")
        stopped = browser.value(shown)
        assert browser.value("document.querySelector('.note, .wrong')?.textContent") is None
        assert browser.until(KEPT) == "yes"
    browser.open(server.url)  # nothing listens there any more
    assert browser.until(f"document.querySelector('.assistant') === null && {STATE}") == "ready"
    browser.value(ASK)
    browser.until(f"{STATE} === 'ready'")
    whole = browser.value(shown)
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    assert "ms" in browser.value("document.getElementById('ttft').textContent")


@pytest.mark.parametrize("quota", [1, 1_000_000])
def test_what_could_not_be_kept_is_told(bundle, quota) -> None:
    """Of 1 MB the page, the bundle and all packages but WebAssembly's 14 MB are kept, of one byte nothing."""
    if not packages():
        pytest.skip(UNFETCHED)
    with Browser() as browser:
        with serving(load(bundle, threads=1)) as server:
            browser.call("Storage.overrideQuotaForOrigin", origin=server.url, quotaSize=quota)
            browser.open(server.url)
            assert browser.until(STATE) == "ready"
            assert browser.until(KEPT) == "no"
            assert "could not be kept" in browser.value(f"{OFFLINE}.parentElement.title")
            browser.value(ASK)
            browser.until(f"{STATE} === 'ready' && document.querySelector('.assistant')?.textContent")
        if quota > 1:
            browser.open(server.url)
            assert browser.until(f"document.querySelector('.assistant') === null && {STATE}") == "wrong"
            told = browser.value("document.querySelector('.wrong').textContent")
            assert told.startswith("packages/ort-wasm-simd-threaded.wasm is not here: no server answers")


def test_a_picture_goes_with_a_message(browser, tiny_bundle, tmp_path) -> None:
    """It has the model's size, so that the browser resizes nothing; what is no picture is told."""
    bundle = tiny_bundle(family="gemma3_vision")
    own = load(bundle, threads=1)
    vision = own.manifest.model.vision
    pixels = np.random.default_rng(0).integers(0, 256, (vision.height, vision.width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (tmp_path / "none.png").write_text("no picture")
    asked = [{"role": "user", "content": f"{vision.mark}\nhey"}]
    steps = own.stream(asked, images=[tmp_path / "one.png"], max_new_tokens=256)
    expected = "".join(step.text for step in steps)
    with serving(load(bundle, threads=1)) as server:
        browser.open(server.url)
        assert browser.until(STATE) == "ready"
        assert not browser.value("document.getElementById('picture').hidden")
        browser.choose("#image", tmp_path / "none.png")
        browser.value(ASK)
        browser.until("document.querySelector('.wrong') !== null")
        assert "none.png is no picture" in browser.value("document.querySelector('.wrong').textContent")
        browser.choose("#image", tmp_path / "one.png")
        browser.value(ASK)
        browser.until(f"{STATE} === 'ready' && document.querySelector('.assistant') !== null")
        assert browser.value("document.querySelector('.assistant').textContent") == expected
        assert browser.value("document.querySelectorAll('.user img').length") == 2


def test_what_does_not_fit_is_told_with_its_size(browser, bundle, tmp_path) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "large"))
    with serving(load(own, threads=1)) as server:
        manifest = own / "manifest.json"
        weights = read_manifest(own).weights.file.nbytes
        manifest.write_text(manifest.read_text().replace(f'"nbytes": {weights},', '"nbytes": 5200000000,', 1))
        browser.open(server.url)
        assert browser.until(STATE) == "wrong"
        assert "weights are 5.2 GB and a browser can hold 1.9 GB" in browser.value("document.body.innerText")
        assert browser.value("document.getElementById('send').disabled")


def test_without_simd_the_page_says_so(browser, bundle) -> None:
    """V8 has none on a CPU without SSE 4.1, and can be told that it has one."""
    with serving(load(bundle, threads=1)) as server, Browser("--js-flags=--no-enable-sse4-1") as old:
        old.open(server.url)
        assert old.until(STATE) == "wrong"
        assert "WebAssembly has no SIMD" in old.value("document.body.innerText")
        assert old.value("document.getElementById('send').disabled")


def test_without_its_packages_the_page_says_how_to_get_them(browser, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STILLGRAPH_ENVIRONMENTS", str(tmp_path))
    with serving(load(bundle, threads=1)) as server:
        browser.open(server.url)
        assert browser.until(STATE) == "wrong"
        assert "run 'python -m stillgraph.serve.packages'" in browser.value("document.body.innerText")


def test_only_what_the_page_needs_is_given_out(bundle) -> None:
    if not packages():
        pytest.skip(UNFETCHED)
    (bundle / "secret.txt").write_text("not the manifest's")
    with serving(load(bundle, threads=1)) as server:
        for path in ("/", "/worker.js", "/manifest.json", "/weights.data", *(f"/{name}" for name in FILES)):
            status, content, headers = server.get(path)
            assert status == 200
            assert content
            assert headers["cross-origin-embedder-policy"] == "require-corp"
        for path in (
            "/secret.txt",
            "/package.json",
            "/packages/package.json",
            "/../app.py",
            "/%2e%2e/app.py",
        ):
            assert server.get(path)[0] == 404
