"""Where a checkpoint is, and its files of JSON: all that can be said of it without torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stillgraph.errors import StillgraphError

STAGE = "read checkpoint"
DEMO = Path(__file__).parent / "demo" / "demo_checkpoint"
SHIPPED = {"demo": DEMO, "demo-vision": Path(__file__).parent / "demo" / "demo_vision_checkpoint"}
NEEDED = ("*.json", "*.jinja", "*.safetensors", "*.model", "merges.txt", "vocab.txt")  # files of a hub id
GGUF_NEEDS = ("gguf", "accelerate")
NO_CONFIG = "name a folder with a Hugging Face checkpoint"


def check_folder(model: str) -> None:
    """Raises StillgraphError for a name that is no checkpoint's; of a hub id nothing is asked yet."""
    if path := gguf_of(model):
        from stillgraph.exporter.gguf_file.unpack import check

        check(path)
    elif folder := _local(model):
        check_config(folder)


def check_config(folder: Path) -> None:
    """Raises StillgraphError where there is no config.json, naming a GGUF that is there in its place."""
    if not (folder / "config.json").is_file() and (found := sorted(folder.glob("*.gguf"))):
        problem = f"{folder} has no config.json, and {found[0].name} is a GGUF"
        raise StillgraphError(STAGE, problem, f"name the file: {found[0]}")
    read_json(folder / "config.json", NO_CONFIG)


def gguf_of(model: str) -> Path | None:
    """The path of a GGUF where one is named. Raises StillgraphError where it or its reader is missing."""
    path = Path(model)
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    if not path.is_file():
        raise StillgraphError(STAGE, f"{model}: no such file", "name a GGUF file on this machine")
    if missing := [name for name in GGUF_NEEDS if find_spec(name) is None]:
        problem = f"{model}: to read a GGUF takes {' and '.join(missing)}, not installed here"
        raise StillgraphError(STAGE, problem, "run: pip install 'stillgraph[export,gguf]'")
    return path


def folder_of(model: str) -> Path:
    """The folder of a checkpoint: of SHIPPED, a local one or a hub id's. Raises StillgraphError."""
    if folder := _local(model):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(NEEDED)))
    except Exception as error:  # the hub client raises dozens of kinds; each means the same to the user
        problem = f"{model}: no such folder, and the hub did not give it ({type(error).__name__})"
        raise StillgraphError(
            STAGE, problem, "check the name and the network, or name a local folder"
        ) from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises StillgraphError, with `remedy` where the file is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StillgraphError(STAGE, f"{path} is missing", remedy) from None
    except OSError as error:
        raise StillgraphError(STAGE, f"{path}: {error.strerror}", "fix the checkpoint folder") from error
    except ValueError as error:
        raise StillgraphError(STAGE, f"{path} is not JSON ({error})", "download the file again") from error
    if not isinstance(content, dict):
        raise StillgraphError(STAGE, f"{path} is not a JSON object", "download the file again")
    return content


def _local(model: str) -> Path | None:
    """A checkpoint's folder on this machine; None of a hub id. Raises StillgraphError for neither."""
    if model in SHIPPED:
        return SHIPPED[model]
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise StillgraphError(
            STAGE,
            f"{model}: no such folder",
            "name a folder, a GGUF file, a hub id, 'demo' or 'demo-vision'",
        )
    return None
