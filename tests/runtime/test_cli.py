"""The command line: what goes where, exit codes, and what is imported for it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

from stillgraph import cli, load
from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exit_codes import guard

KEYS = ["prompt_tokens", "tokens", "text", "finish_reason", "load_ms", "ttft_ms", "tpot_ms", "peak_rss_mb"]


@pytest.fixture
def stdin(monkeypatch):
    """Gives the process bytes to read."""

    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def test_run_writes_the_text_to_stdout_and_a_summary_to_stderr(bundle_of, greedy, capsys) -> None:
    bundle = bundle_of()
    assert cli.main(["run", str(bundle), "--token-ids", "7,9", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out == load(bundle).text.decode(greedy([7, 9], 5, 261)) + "\n"
    assert "2 prompt tokens, 5 tokens (length), TTFT" in err


def test_quiet_leaves_stderr_empty(bundle_of, capsys) -> None:
    assert cli.main(["run", str(bundle_of()), "-p", "hi", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unload", [[], ["--unload-prefill"]])
def test_json_is_one_line_with_the_designs_keys(bundle_of, greedy, capsys, unload) -> None:
    arguments = ["run", str(bundle_of()), "--token-ids", "7,9", "--max-new-tokens", "5", "--json", *unload]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (out.count("\n"), err) == (1, "")
    assert list(report) == [*KEYS, "peak_pss_mb"]
    assert (report["prompt_tokens"], report["tokens"]) == (2, greedy([7, 9], 5, 261))
    assert report["finish_reason"] == "length"
    assert min(report[key] for key in KEYS[4:]) > 0


def test_one_token_has_no_time_between_tokens(bundle_of, capsys) -> None:
    assert cli.main(["run", str(bundle_of()), "-p", "a", "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tpot_ms"] is None


def test_a_prompt_comes_from_text_a_file_or_stdin(bundle_of, tmp_path: Path, capsys, stdin) -> None:
    bundle, file = str(bundle_of()), tmp_path / "prompt.txt"
    file.write_bytes("h\u00e9llo\n".encode())
    outputs = []
    ways = (["-p", "h\u00e9llo"], ["--prompt-file", str(file)], ["-p", "-"], ["--prompt-file", "-"])
    for arguments in ways:
        stdin("h\u00e9llo\n".encode())
        assert cli.main(["run", bundle, *arguments, "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["tokens"])
    assert outputs == [outputs[0]] * 4


def test_chat_of_run_applies_the_template(bundle_of, capsys) -> None:
    assert cli.main(["run", str(bundle_of()), "-p", "hi", "--chat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1 + len("user\nhi") + 1 + 1


def test_options_reach_the_engine(bundle_of, capsys) -> None:
    bundle = str(bundle_of())

    def tokens(*options: str) -> list[int]:
        assert cli.main(["run", bundle, "-p", "abc", "--json", "--max-new-tokens", "8", *options]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    plain = tokens()
    sampled = ("--temperature", "90", "--seed", "1")
    assert tokens(*sampled) == tokens(*sampled) != plain
    for option in (["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"]):
        assert tokens("--temperature", "90", *option) == plain
    assert tokens("--repetition-penalty", "0.001") != plain


def test_a_stop_string_ends_the_text(bundle_of, capsys) -> None:
    bundle = str(bundle_of())
    command = ["run", bundle, "--token-ids", "7,9", "--max-new-tokens", "9", "--json"]
    assert cli.main(command) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert cli.main([*command, "--stop", "never", "--stop", text[3]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["text"], report["finish_reason"]) == (text.partition(text[3])[0], "stop")


WRONG = [
    ([], "0 prompts were given; give one of --prompt"),
    (["-p", "a", "--token-ids", "1"], "2 prompts were given"),
    (["-p", ""], "the prompt is empty"),
    (["--token-ids", "1,x"], "'1,x' is not a list of numbers"),
    (["--token-ids", "1", "--chat"], "--token-ids cannot be used with --chat"),
    (["--token-ids", "261"], "token id 261 is outside the vocabulary of 261"),
    (["--prompt-file", "/no/such/file"], "/no/such/file: No such file"),
    (["-p", "a" * 65], "the prompt has 66 tokens and the cache takes 64"),
    (["-p", "a", "--top-p", "2"], "top_p is 2.0"),
    (["-p", "a", "--threads", "0"], "threads is 0"),
    (["-p", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    (["-p", "a", "--stop", ""], "a stop string is empty"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_use_is_one_sentence_and_exit_code_2(bundle_of, capsys, arguments, said) -> None:
    assert cli.main(["run", str(bundle_of()), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_prompt_that_is_no_text(bundle_of, capsys, stdin) -> None:
    stdin(b"\xff\xfe")
    assert cli.main(["run", str(bundle_of()), "-p", "-"]) == 2
    assert "- is not UTF-8 text" in capsys.readouterr().err


def test_usage_errors_are_exit_code_2(bundle_of) -> None:
    assert cli.main(["run", str(bundle_of()), "-p", "a", "--top-k", "many"]) == 2
    assert cli.main(["nothing"]) == 2


def test_chat_remembers_and_continues_its_cache(bundle_of, capsys, stdin) -> None:
    bundle = bundle_of(ctx=256)
    stdin(b"hi\n\nyou\n/reset\nhi\n/exit\nnot read\n")
    assert cli.main(["chat", str(bundle), "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    counts = [int(line.split()[0]) for line in err.splitlines()]
    assert len(counts) == 3
    assert counts[1] > counts[0] + len("you")  # the answer is in it
    assert counts[2] == counts[0]
    first = load(bundle)
    steps = first.stream(first.ids([{"role": "user", "content": "hi"}]), max_new_tokens=6)
    assert out.startswith("".join(step.text for step in steps) + "\n")


def test_a_chat_that_fails_from_a_pipe_is_exit_code_2(bundle_of, capsys, stdin) -> None:
    stdin(b"a" * 70)
    assert cli.main(["chat", str(bundle_of())]) == 2
    assert "the cache takes 64" in capsys.readouterr().err


def entry_points_of(monkeypatch, **loaded) -> list[str]:
    """Fake these commands as installed; returns the list of the ones that get imported."""
    imported: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> object:
            imported.append(self.name)
            value = loaded[self.name]
            if isinstance(value, Exception):
                raise value
            return value

    monkeypatch.setattr(cli, "entry_points", lambda group: [Fake(name) for name in loaded])
    return imported


def test_only_the_command_asked_for_is_imported(monkeypatch, capsys) -> None:
    group = typer.Typer()
    group.command("decode")(lambda: print("decoded"))
    group.command("prefill")(lambda: print("prefilled"))
    imported = entry_points_of(monkeypatch, export=group, inspect=lambda: print("inspected"))
    assert cli.main(["export", "decode"]) == 0
    assert cli.main(["inspect"]) == 0
    assert capsys.readouterr().out == "decoded\ninspected\n"
    assert imported == ["export", "inspect"]


def test_help_lists_commands_that_cannot_be_imported(monkeypatch, capsys) -> None:
    entry_points_of(monkeypatch, export=ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "Not available: No module named 'torch'" in out


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys) -> None:
    entry_points_of(monkeypatch, export=ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert cli.main(["export", "bundle"]) == 2
    said = "error: stillgraph export: torch is not installed; pip install 'stillgraph[export]'.\n"
    assert capsys.readouterr().err == said


def fail(error: BaseException):
    def app(_: list[str]) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StillgraphError("stage", "problem", "remedy"), 2, "error: stage: problem; remedy.\n"),
        (CheckFailed("stage", "problem", "remedy"), 1, "error: stage: problem; remedy.\n"),
        (OSError(28, "No space left on device", "out"), 2, "error: out: No space left on device; "),
        (RuntimeError("odd\nmore"), 1, "error: unexpected RuntimeError (odd); run again with --debug"),
        (
            ModuleNotFoundError("No module named 'stillgraph.x'", name="stillgraph.x"),
            1,
            "error: unexpected Module",
        ),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_errors_become_exit_codes(capsys, error, code, said) -> None:
    assert guard(fail(error), []) == code
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--debug", "a"], ["a", "--debug"]])
def test_debug_anywhere_shows_the_traceback(capsys, arguments) -> None:
    seen: list[list[str]] = []

    def app(args: list[str]) -> None:
        seen.append(args)
        raise RuntimeError("odd")

    assert guard(app, arguments) == 1
    assert seen == [["a"]]
    assert "Traceback" in capsys.readouterr().err


def test_debug_in_the_environment_and_behind_dashes(capsys, monkeypatch) -> None:
    assert guard(lambda args: sys.exit(args == ["--", "--debug"]), ["--", "--debug"]) == 1
    monkeypatch.setenv("STILLGRAPH_DEBUG", "1")
    guard(fail(RuntimeError("odd")), [])
    assert "Traceback" in capsys.readouterr().err


def test_the_runtime_imports_no_torch() -> None:
    code = "import sys, stillgraph.cli, stillgraph.engine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "onnxruntime" in imported
    assert not imported & {"torch", "transformers", "onnx", "onnx_ir", "safetensors"}
    assert not imported & {"stillgraph.exporter", "stillgraph.patches"}


def test_importing_stillgraph_is_light() -> None:
    code = "import sys, stillgraph.manifest; assert 'onnxruntime' not in sys.modules; assert stillgraph.load"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_entry_point_of_the_package_is_what_the_group_says() -> None:
    """The group's name is written in pyproject.toml too."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'[project.entry-points."{cli.GROUP}"]' in text
    assert EntryPoint("main", "stillgraph.cli:main", "console_scripts").load() is cli.main
