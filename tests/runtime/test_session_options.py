"""Providers and options of sessions that a user chooses, and what they cannot change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from stillgraph import load, loading
from stillgraph.compiled import COMPILED
from stillgraph.cpu import EXACT_SUMS, cpu_name
from stillgraph.manifest import read
from stillgraph.session_options import OURS, SessionChoice, session_options

CPU, OTHER = "CPUExecutionProvider", "AzureExecutionProvider"  # the other of ONNX Runtime's own wheel
SPINNING = "session.intra_op.allow_spinning"
needs_other = pytest.mark.skipif(OTHER not in ort.get_available_providers(), reason=f"needs {OTHER}")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """The entry, the options and the providers of every session that is opened."""
    calls: list[tuple[Any, Any, Any]] = []
    original = loading.Session

    def session(path: Path, entry: Any, options: Any, providers: Any) -> Any:
        calls.append((entry, options, providers))
        return original(path, entry, options, providers)

    monkeypatch.setattr(loading, "Session", session)
    return calls


def test_options_reach_every_session_and_exact_sums_stay(bundle_of, opened) -> None:
    wanted = {SPINNING: False, "session.force_spinning_stop": "0", "intra_op_num_threads": 3}
    load(bundle_of(), threads=1, session_options=wanted | {"log_severity_level": 4})
    assert len(opened) == 2
    for _, options, providers in opened:
        assert options.get_session_config_entry(SPINNING) == "0"
        assert options.get_session_config_entry("session.force_spinning_stop") == "0"
        assert (options.intra_op_num_threads, options.log_severity_level) == (3, 4)
        assert {name: options.get_session_config_entry(name) for name in EXACT_SUMS} == EXACT_SUMS
        assert providers == (CPU,)


def test_an_option_that_is_set_twice_is_not_warned_of(bundle_of, capfd) -> None:
    """ONNX Runtime writes a warning for a config entry that has a value already."""
    entry = read(bundle_of()).graphs["prefill"]
    session_options(entry, False, SessionChoice.of(1, None, {"session.force_spinning_stop": "0"}))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_exact_sums_and_weights_depend_on_is_refused(bundle_of, refused, name: str) -> None:
    assert set(EXACT_SUMS) <= OURS
    with refused("load bundle", f"{name} of session_options is what exact sums or mapped", "leave it out"):
        load(bundle_of(), session_options={name: "0"})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"session_options": {"intra_op_threads": 2}}, "session_options has 'intra_op_threads'; use a config"),
    ({"session_options": {"add_initializer": 2}}, "session_options has 'add_initializer'"),
    ({"session_options": {5: 2}}, "session_options has 5"),
    (
        {"session_options": {"intra_op_num_threads": "two"}},
        "intra_op_num_threads of session_options is",
    ),
    ({"session_options": ["a"]}, "session_options is of type list; give a dict"),
    ({"providers": ["NpuExecutionProvider"]}, "NpuExecutionProvider is no provider of this onnxruntime"),
    ({"providers": [("NpuExecutionProvider", {})]}, "NpuExecutionProvider is no provider"),
    ({"providers": []}, "providers is []; give a list of "),
    ({"providers": CPU}, f"providers is '{CPU}'; give a list of "),
    ({"providers": 5}, "providers is 5; give a list of "),
    ({"providers": [None]}, "providers has None"),
    ({"providers": [()]}, "providers has ()"),
    ({"providers": [(CPU,)]}, "providers has ('CPUExecutionProvider',)"),
    ({"providers": [(CPU, {}, 1)]}, "providers has ('CPUExecutionProvider', {}, 1)"),
    ({"threads": 0}, "threads is 0; give 1 or more"),
    ({"threads": "2"}, "threads is '2'"),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_what_cannot_be_used_is_one_sentence(bundle_of, refused, values: dict[str, Any], said: str) -> None:
    there = ort.get_available_providers() if "give a list of" in said or "no provider" in said else []
    with refused("load bundle", said, *there):
        load(bundle_of(), **values)


def test_a_provider_may_come_with_options(bundle_of, greedy, opened) -> None:
    providers = [(CPU, {"use_arena": "0"})]
    engine = load(bundle_of(), providers=providers)
    assert [each for _, _, each in opened] == [tuple(providers)] * 2
    assert [step.token for step in engine.stream([7, 9], max_new_tokens=5)] == greedy([7, 9], 5, 261)


def edited(bundle: Path, former: str, new: str) -> Path:
    """A bundle with other words in its manifest."""
    text = (bundle / "manifest.json").read_text()
    assert former in text
    (bundle / "manifest.json").write_text(text.replace(former, new))
    return bundle


@needs_other
@pytest.mark.parametrize("continues", [True, False])
def test_no_other_provider_writes_where_it_reads(bundle_of, greedy, opened, continues: bool) -> None:
    bundle = edited(bundle_of(continues=continues), '"same_buffer": false', '"same_buffer": true')
    load(bundle, threads=1)
    assert all(alias.same_buffer for entry, _, _ in opened for alias in entry.aliases)
    opened.clear()
    engine = load(bundle, threads=1, providers=[OTHER, CPU])
    assert [alias.same_buffer for entry, _, _ in opened for alias in entry.aliases] == [False] * (
        4 if continues else 2
    )
    assert [step.token for step in engine.stream([7, 9], max_new_tokens=5)] == greedy([7, 9], 5, 261)


@needs_other
def test_ops_for_the_cpu_are_refused_to_any_other_provider(bundle_of, refused) -> None:
    bundle = edited(bundle_of(), '"portable"', '"onnxruntime"')
    with refused(
        "load bundle",
        "is made of ops of ONNX Runtime's CPU provider, and providers has others",
        "--target portable",
    ):
        load(bundle, providers=[OTHER, CPU])
    assert load(bundle, providers=[CPU])


@needs_other
def test_a_compiled_folder_is_for_the_cpu_alone(bundle_of, caplog) -> None:
    bundle = bundle_of()
    (bundle / COMPILED / cpu_name()).mkdir(parents=True)  # it holds nothing, of which a load would warn
    load(bundle, providers=[OTHER, CPU])
    assert caplog.records == []
    load(bundle)
    assert "is not used" in caplog.text
