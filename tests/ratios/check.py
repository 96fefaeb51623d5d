"""`make bench`: ratios of the demo and of four layers of Gemma 3 1B beside those that ratios.json keeps.

    python tests/ratios/check.py FOLDER [--update]

Ratios to PyTorch, never times, so that another machine's speed says nothing; another kind of CPU has its own.
A ratio that has grown by more than TOLERANCE is a warning on stderr; the exit code is 0 all the same, because
a shared machine is no judge. FOLDER keeps the checkpoint and the bundles for the next time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from stillgraph.cpu import cpu_name
from stillgraph.errors import StillgraphError
from stillgraph.manifest import read

KEPT = Path(__file__).with_name("ratios.json")
TOLERANCE = 1.25  # over the noise of three turns on a shared machine
RATIOS = ("ttft_ratio", "tpot_ratio", "peak_pss_ratio")
SMALL = RATIOS[1:]  # a prefill of the demo takes some ms, which tell nothing
STILLGRAPH = (sys.executable, "-m", "stillgraph")
Found = dict[str, dict[str, float]]


def write_cut(folder: Path) -> None:
    """Four layers of the 1B geometry, one of them full, with seeded random weights in bfloat16."""
    if (folder / "model.safetensors").exists():
        return
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=512, layer_types=kinds, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForCausalLM(config).save_pretrained(folder)


def readable(bundle: Path) -> bool:
    """False also for a bundle of another format version, which an older stillgraph left in FOLDER."""
    try:
        read(bundle)
    except StillgraphError:
        return False
    return True


def measure(folder: Path, model: str) -> Found:
    """The ratios of each contender over PyTorch, of one interleaved run of three turns."""
    bundle = folder / (Path(model).name + "-int4")
    form = ["--target", "onnxruntime", "--precision", "int4", "--no-validate", "--quiet"]
    # What the kept ratios are of: all of it at four bits, in blocks of 128.
    form += ["--calibrate", "none", "--block-size", "128", "--symmetric"]
    form += ["--keep", "lm_head=int4", "--keep", "embed_tokens=int4"]
    if not readable(bundle):
        export = [*STILLGRAPH, "export", "bundle", "--model", model, *form, "--out", str(bundle)]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [*STILLGRAPH, "compile", str(bundle), "--quiet"], check=True, stdout=subprocess.DEVNULL
        )
    against, ratios = ("torch", SMALL) if model == "demo" else ("torch,portable", RATIOS)
    bench = [*STILLGRAPH, "bench", str(bundle), "--against", against, "--turns", "3", "--new-tokens", "24"]
    bench += ["--work", str(folder), "--patience", "2", "--quality", "none", "--json"]
    line = subprocess.run(bench, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    rows = json.loads(line)["results"]
    for row in rows:
        if row["note"]:
            print(f"warning: {model} {row['name']}: {row['note']}", file=sys.stderr)
    others = [row for row in rows if row["name"] != "torch" and row["ttft_ratio"]]
    return {row["name"]: {key: row[key] for key in ratios} for row in others}


def grown(kept: Found, found: Found) -> list[str]:
    """What is worse than it was, in words, and what was not measured."""
    worse = [
        f"{name}: {key} is {row[key]:.2f} and was {kept[name][key]:.2f}"
        for name, row in found.items()
        for key in row
        if name in kept and row[key] > TOLERANCE * kept[name].get(key, row[key])
    ]
    return worse + [f"{name} was not measured" for name in kept if name not in found]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--update", action="store_true", help="keep what was found in ratios.json")
    args = parser.parse_args()
    cut = args.folder / "gemma-3-1b-4-layers"
    write_cut(cut)
    found = {name: measure(args.folder, model) for name, model in (("demo", "demo"), ("4 layers", str(cut)))}
    kept: dict[str, dict[str, Found]] = json.loads(KEPT.read_text(encoding="ascii")) if KEPT.exists() else {}
    cpu = cpu_name().rpartition("-")[0]  # less the hash of its instruction sets
    if cpu not in kept:
        print(f"warning: no ratios of {cpu} are kept; --update keeps these", file=sys.stderr)
    for name, rows in found.items():
        for line in grown(kept.get(cpu, {}).get(name, {}), rows):
            print(f"warning: {name}: {line}", file=sys.stderr)
    print(json.dumps(found, indent=1))
    if args.update:
        KEPT.write_text(json.dumps(kept | {cpu: found}, indent=1) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
