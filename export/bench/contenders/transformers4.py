"""A checkpoint of transformers 5 as transformers 4 reads it, which the exporters of the peers still need."""

from __future__ import annotations

import json
from pathlib import Path

OTHER_FILES = ("config.json", "tokenizer_config.json")


def folder_for_transformers4(checkpoint: Path, models: Path) -> Path:
    """A folder of links to the checkpoint's files with the two files in the former form beside them."""
    folder = models / f"{checkpoint.name}-transformers4"
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        link = folder / file.name
        if file.name not in OTHER_FILES and not link.exists():
            link.symlink_to(file.resolve())
    config = json.loads((checkpoint / OTHER_FILES[0]).read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma 3
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern", 6)
    else:
        config["rope_theta"] = rope["rope_theta"]
    (folder / OTHER_FILES[0]).write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer = json.loads((checkpoint / OTHER_FILES[1]).read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / OTHER_FILES[1]).write_text(json.dumps(tokenizer, indent=2), encoding="utf-8")
    return folder


def folder_mb(folder: Path) -> float:
    """Bytes of a folder's files, in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
