"""Checkpoints and pictures from strangers: what they hold, or one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from io import BytesIO
from pathlib import Path
from random import Random

from tests.faults import mutate
from tests.faults.damages import damaged
from tests.faults.outcome import Outcome, Trial, outcome
from tests.faults.subjects import SCENE


def headers(seed: int, scratch: Path) -> Trial:
    """A header that is another's, and valid, is that checkpoint's: each tensor has then to be readable."""
    from stillgraph.exporter.checkpoint import open_checkpoint
    from stillgraph.exporter.checkpoint_folder import DEMO

    folder = shutil.copytree(DEMO, scratch / "checkpoint")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]

    def trial(number: int) -> Outcome:
        random = Random(f"{seed} headers {number}")
        text = mutate.document(header, random).encode("utf-8", "surrogatepass")
        length = len(text) if random.random() < 0.9 else random.choice([0, 1, size + 1, 2**40, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", length) + text + rest)

        def call() -> bool:
            checkpoint = open_checkpoint(str(folder))
            return all(checkpoint.tensor(name).isfinite() is not None for name in checkpoint.tensors)

        return outcome(call, f"trial {number}, header {text[:80]!r}")

    return trial


def images(seed: int, scratch: Path) -> Trial:
    from PIL import Image

    with Image.open(SCENE) as opened:
        scene = opened.convert("RGB")
    files = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        stream = BytesIO()
        scene.save(stream, kind)
        files.append((kind, stream.getvalue()))

    def trial(number: int) -> Outcome:
        """Any picture is right: what a damaged one shows is its own business."""
        random = Random(f"{seed} images {number}")
        kind, data = random.choice(files)
        for _ in range(random.choice([1, 2, 5])):
            head = min(len(data), random.choice([64, len(data)]))  # half of them in the header
            changed, how = damaged(data[:head], random)
            data = changed + data[head:]

        def call() -> bool:
            from stillgraph.vision.image_file import open_image

            return open_image(data).mode == "RGB"

        return outcome(call, f"trial {number}, {kind}, {how}")

    return trial
