"""Wrong use is told before anything heavy is imported: seconds for torch, and some tenths for ONNX Runtime.

All cases run in one fresh process, which stops at the first that imports what it must not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime", "safetensors"]
# Each with a part of what is said. BUNDLE, EMPTY (a folder), FULL (one that is no bundle), NONE are paths.
CASES = [
    ("export bundle --precision int3", "--precision 'int3' is not supported"),
    ("export bundle --precision int8 --keep nonsense", "--keep 'nonsense' is not PATTERN=PRECISION"),
    ("export bundle --target npu", "--target 'npu' is not supported"),
    ("export bundle --ctx 1 --max-len 1", "--ctx 1 leaves no room"),
    ("export bundle --max-len 9 --ctx 8", "--max-len 9 is over --ctx 8"),
    ("export bundle -m NONE", "NONE: no such folder"),
    ("export bundle -m EMPTY", "EMPTY/config.json is missing"),
    ("export bundle --out FULL", "FULL exists and is not a bundle"),
    ("export prefill -m NONE", "NONE: no such folder"),
    ("export decode --out FULL", "FULL exists and is not a bundle"),
    ("export vision -m NONE", "NONE: no such folder"),
    ("export dynamic -m NONE", "NONE: no such folder"),
    ("validate BUNDLE -m NONE", "NONE: no such folder"),
    ("validate BUNDLE --full --quick", "--full and --quick were both given"),
    ("validate BUNDLE --text NONE", "NONE: No such file or directory"),
    ("validate BUNDLE --table NONE/table.md", "no such folder"),
    ("export bundle --text NONE", "NONE: No such file or directory"),
    ("export bundle --text NONE --no-validate", "--text does nothing with --no-validate"),
    *(
        (f"{command} {folder}", said)
        for command in ("simplify", "compile", "validate", "inspect", "bench", "run -p a", "chat")
        for folder, said in (("NONE", "NONE: no such folder"), ("EMPTY", "EMPTY: the folder has no manifest"))
    ),
    ("bench BUNDLE --against nonsense", "--against 'nonsense' is not a contender"),
    ("run BUNDLE", "0 prompts were given"),
    ("run BUNDLE -p a --image NONE", "NONE does not exist"),
    ("run BUNDLE -p a --threads 0", "threads is 0"),
    ("run BUNDLE -p a --top-k 0", "top_k is 0"),
    ("run BUNDLE -p a --max-new-tokens 0", "max_new_tokens is 0"),
    ("run BUNDLE -p a --stop=", "a stop string is empty"),
    ("chat BUNDLE --temperature -1", "temperature is -1.0"),
]
CHILD = """
import json, sys
from stillgraph.cli import main
heavy, cases = json.loads(sys.argv[1])
for arguments in cases:
    code = main(arguments)
    found = [name for name in heavy if name in sys.modules]
    print(json.dumps([arguments, code, found]), file=sys.stderr, flush=True)
    if found:
        break
"""


def test_wrong_use_is_told_before_heavy_imports(bundle_of, tmp_path: Path) -> None:
    paths = {"BUNDLE": bundle_of(ctx=256), "EMPTY": tmp_path / "empty", "FULL": tmp_path / "full"}
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "file").touch()
    paths["NONE"] = tmp_path / "none"

    def filled(text: str) -> str:
        for word, path in paths.items():
            text = text.replace(word, str(path))
        return text

    asked = json.dumps([HEAVY, [filled(command).split() for command, _ in CASES]])
    command = [sys.executable, "-c", CHILD, asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    lines = iter(done.stderr.splitlines())
    for arguments, said in CASES:
        error = next(lines)
        assert error.startswith("error: "), error
        assert filled(said) in error
        assert json.loads(next(lines)) == [filled(arguments).split(), 2, []]
    assert done.stdout == ""
