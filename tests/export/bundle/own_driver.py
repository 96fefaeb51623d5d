"""Greedy tokens of a bundle, by its manifest.json alone: what a driver in another language has to do.

    python own_driver.py BUNDLE COUNT ID [ID ..]    prints a JSON list of tokens

It takes the first row of static graphs whose prefill continues a cache.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

NUMPY = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


class Driver:
    def __init__(self, bundle: Path) -> None:
        self.manifest = json.loads((bundle / "manifest.json").read_text())
        self.calling = self.manifest["calling"]
        self.graphs = {graph["shape"]["role"]: graph for graph in self.manifest["graphs"].values()}
        self.sessions = {
            role: ort.InferenceSession(bundle / graph["file"]["path"]) for role, graph in self.graphs.items()
        }
        initial = self.calling["cache"]["initial"]
        self.cache = {
            (port["role"], port["layer"]): np.full(port["shape"], initial, NUMPY[port["dtype"]])
            for port in self.graphs["decode"]["inputs"]
            if port["layer"] is not None
        }

    def call(self, role: str, ids: list[int], past: int) -> np.ndarray:
        """Feed ids behind `past` tokens; logits [V] after the last of them."""
        graph, feeds = self.graphs[role], {}
        for port in graph["inputs"]:
            if port["layer"] is not None:
                feeds[port["name"]] = self.cache[port["role"], port["layer"]]
                continue
            fill = {"token_ids": self.calling["tokens"]["pad"], "valid_length": len(ids), "past_length": past}
            feeds[port["name"]] = np.full(port["shape"], fill[port["role"]], NUMPY[port["dtype"]])
            if port["role"] == "token_ids":
                feeds[port["name"]][0, : len(ids)] = ids
        found = self.sessions[role].run([port["name"] for port in graph["outputs"]], feeds)
        for port, value in zip(graph["outputs"], found, strict=True):
            if port["layer"] is None:
                logits = value[0, -1]
            else:
                self.cache[port["role"], port["layer"]] = value
        return logits

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        chunk, ctx = self.calling["prompt"]["chunk"], self.graphs["decode"]["shape"]["ctx"]
        for start in range(0, len(prompt), chunk):
            logits = self.call("prefill", prompt[start : start + chunk], start)
        tokens = [int(logits.argmax())]
        while (
            len(tokens) < count
            and tokens[-1] not in self.calling["tokens"]["stop"]
            and len(prompt) + len(tokens) <= ctx
        ):
            logits = self.call("decode", tokens[-1:], len(prompt) + len(tokens) - 1)
            tokens.append(int(logits.argmax()))
        return tokens


if __name__ == "__main__":
    folder, number, *ids = sys.argv[1:]
    print(json.dumps(Driver(Path(folder)).tokens([int(token) for token in ids], int(number))))
