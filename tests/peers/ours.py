"""A bundle of ours, as one contender."""

from __future__ import annotations

from collections.abc import Iterator

import onnxruntime
from protocol import Request, run

from runtime import load


class Ours:
    def __init__(self, request: Request) -> None:
        self.engine = load(request.model, threads=request.threads)
        self.engine._stop_tokens = frozenset()  # random weights choose stop tokens like any other
        manifest = self.engine.manifest
        kind = f"{manifest.target} {manifest.precision}"
        self.versions = {"onnxruntime": onnxruntime.__version__, "bundle": kind}

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        self.engine.reset()
        return (step.token for step in self.engine.stream(ids, max_new_tokens=count))


if __name__ == "__main__":
    run(Ours)
