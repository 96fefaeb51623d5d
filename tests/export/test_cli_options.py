"""Options of an export that are refused, each with one sentence, and those of quantization that are not."""

from __future__ import annotations

import pytest

from stillgraph import cli
from stillgraph.manifest import Quantization

SIZES = ["--max-len", "8", "--ctx", "16"]
ORT = ["--target", "onnxruntime"]
WRONG = [
    (["bundle", "--max-len", "32", "--ctx", "16"], "--max-len 32 is over --ctx 16; lower --max-len"),
    (["prefill", "--max-len", "32", "--ctx", "16"], "--max-len 32 is over --ctx 16"),
    (["prefill", "--max-len", "0"], "--max-len 0 is not a number of tokens"),
    (["prefill", "--max-len", "-5"], "--max-len -5 is not a number of tokens"),
    (["prefill", "--max-len", "8", "--ctx", "-1"], "--ctx -1 is not a number of tokens"),
    (["prefill", "--max-len", "65"], "--max-len 65 is over the model's max_position_embeddings of 64; lower"),
    (["decode", "--ctx", "0"], "--ctx 0 leaves no room for a next token"),
    (["decode", "--ctx", "65"], "--ctx 65 is over the model's max_position_embeddings of 64; lower --ctx."),
    (["bundle", *SIZES, "--target", "npu"], "--target 'npu' is not supported; use portable or onnxruntime."),
    (
        ["bundle", *SIZES, "--precision", "int3"],
        "--precision 'int3' is not supported; use fp32 or fp16 or",
    ),
    (
        ["bundle", *SIZES, *ORT, "--precision", "fp16"],
        "--precision fp16 cannot be stored by the ops of",
    ),
    (
        ["bundle", *SIZES, "--precision", "int4", "--block-size", "33"],
        "--block-size 33 is not supported",
    ),
    (
        ["decode", "--ctx", "16", "--block-size", "32"],
        "--block-size, --asymmetric, --keep, --budget, --kl and --fast-prefill",
    ),
    (
        ["prefill", "--asymmetric"],
        "do nothing at --precision fp32; leave them out, or use --precision",
    ),
    (["bundle", *SIZES, "--fast-prefill"], "do nothing at --precision fp32; leave them out"),
    (["bundle", *SIZES, "--keep", "lm_head=int8"], "do nothing at --precision fp32; leave them out"),
    (["bundle", *SIZES, "--precision", "int4", "--fast-prefill"], "that --target portable does not use; use"),
    (
        ["bundle", *SIZES, "--precision", "int4", "--keep", "lm_head"],
        "--keep 'lm_head' is not PATTERN=",
    ),
    (
        ["prefill", "--precision", "int8", "--keep", "a=int8", "--keep", "a=int9"],
        "--keep 'a=int9'",
    ),
    (
        ["bundle", *SIZES, "--precision", "int4", "--keep", "a=int8", "--keep", "a=fp32"],
        "--keep a is given as int8 and as fp32; give one of them.",
    ),
    (["prefill", "--max-len", "8", *ORT], "give the --ctx of that cache."),
    (["bundle", *SIZES, "--batch", "0"], "--batch 0 is not a number of rows; use 1 or more."),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_use_is_one_sentence_and_exit_code_2(
    tiny_checkpoint, tmp_path, capsys, arguments, said
) -> None:
    out = tmp_path / "bundle"
    command = ["export", *arguments, "-m", str(tiny_checkpoint()), "--out", str(out), "--quiet"]
    assert cli.main(command) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert said in stderr
    assert (stderr.startswith("error: "), stderr.count("\n"), stderr.count(". ")) == (True, 1, 0)
    assert not out.exists()


@pytest.mark.parametrize("command", [["bundle", *SIZES], ["decode", "--ctx", "16"]])
def test_a_head_size_that_the_target_does_not_take(tiny_checkpoint, tmp_path, capsys, command) -> None:
    out, model = tmp_path / "bundle", str(tiny_checkpoint(head_dim=20))
    assert cli.main(["export", *command, *ORT, "-m", model, "--out", str(out), "--quiet"]) == 2
    stdout, stderr = capsys.readouterr()
    said = "a head size of 20 is not a multiple of 8, which GroupQueryAttention of --target onnxruntime needs"
    assert (stdout, stderr) == ("", f"error: export: {said}; use --target portable.\n")
    assert not out.exists()


def test_options_of_quantization_reach_the_export(tmp_path, monkeypatch, capsys) -> None:
    asked = []

    def fake(config, shapes, replace, say, vision=False):
        asked.append((config, [shape.slack for shape in shapes]))
        raise ZeroDivisionError

    monkeypatch.setattr("stillgraph.exporter.bundle.build.export", fake)
    options = [
        "--precision",
        "int4",
        "--block-size",
        "32",
        "--asymmetric",
        "--keep",
        "a=int8",
        "--keep",
        "b=fp32",
        "--calibrate",
        "none",
    ]
    sizes = {"prefill": ["--max-len", "200", "--ctx", "1024"], "decode": ["--ctx", "1024"]}
    sizes["bundle"] = sizes["prefill"]
    for command, size in sizes.items():
        arguments = ["export", command, *size, *ORT, *options, "--fast-prefill", "--out", str(tmp_path)]
        assert cli.main([*arguments, "--quiet"]) == 1
        config, slacks = asked.pop()
        assert config.target == "onnxruntime"
        assert config.quantization == Quantization(
            block_size=32,
            symmetric=False,
            keep={"embed_tokens": "int8", "lm_head": "int8", "a": "int8", "b": "fp32"},
            refine=1024,
            fast_prefill=True,
        )
        assert slacks == {"prefill": [199], "decode": [128], "bundle": [199, 199]}[command]
