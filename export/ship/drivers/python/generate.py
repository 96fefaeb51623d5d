"""Text from a bundle's graphs, by manifest.json and the runtime in backend.py.

    python generate.py --token-ids 2,17,5 [--max-new-tokens 64]
    python generate.py --golden golden.json     # a line of JSON for each case

Always the most likely token. Shapes: P tokens of a call, V vocabulary.
"""

import argparse
import base64
import io
import json
import time
from pathlib import Path

import numpy as np
from backend import Backend

FOLDER = Path(__file__).resolve().parent


class Driver:
    def __init__(self, folder):
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.calling, self.model = self.manifest["calling"], self.manifest["model"]
        graphs = sorted(
            self.manifest["graphs"].values(), key=lambda graph: graph["shape"]["int8_activations"]
        )
        self.graphs = {}
        for graph in graphs:  # of two prefills, the one with the decode's weights
            self.graphs.setdefault(graph["shape"]["role"], graph)
        self.backend = Backend(folder, self.manifest, self.graphs)

    def generate(self, prompt, most, png=None):
        """(token, logits [V]) until a stop token, `most` tokens or the end of the cache; returns why."""
        features = self.look(png) if png else None
        logits = self.prefill(prompt, features)
        fed, count = len(prompt), 0
        while True:
            token, count = int(logits.argmax()), count + 1
            yield token, logits
            if token in self.calling["tokens"]["stop"]:
                return "stop"
            if count == most:
                return "length"
            if fed == self.graphs["decode"]["shape"]["ctx"]:
                return "context"
            logits = self.call("decode", {"token_ids": [[token]], "past_length": [fed]})
            fed += 1

    def prefill(self, prompt, features):
        chunk, done, used = self.calling["prompt"]["chunk"], 0, 0
        while done < len(prompt):
            count = self.uncut(prompt, done, min(chunk, len(prompt) - done))
            ids = np.full((1, chunk), self.calling["tokens"]["pad"], np.int64)
            ids[0, :count] = prompt[done : done + count]
            given = {"token_ids": ids, "valid_length": [count], "past_length": [done]}
            if "embed" in self.graphs:
                vision, inside = self.model["vision"], np.zeros((1, chunk), bool)
                inside[0, :count] = ids[0, :count] == vision["image_token"]
                embeddings = self.call("embed", {"token_ids": ids}).copy()
                size, seen = vision["image_tokens"], int(inside.sum())
                if seen:
                    embeddings[inside] = features[used : used + seen]
                numbers = np.zeros((1, chunk), np.int64)
                numbers[inside] = 1 + (used + np.arange(seen)) // size - used // size
                given |= {"embeddings": embeddings, "picture_numbers": numbers}
                used += seen
            logits = self.call("prefill", given)
            done += count
        return logits

    def uncut(self, prompt, done, count):
        """Tokens of a call that must not end within a picture."""
        if not self.calling["prompt"]["whole_images"]:
            return count
        vision, start = self.model["vision"], done
        while start < done + count:
            size = vision["image_tokens"] if prompt[start] == vision["image_token"] else 1
            if start + size > done + count:
                return start - done
            start += size
        return count

    def look(self, png):
        """Features [T, hidden] of a PNG that has the size of the model's input."""
        from PIL import Image

        steps, vision = self.calling["images"], self.model["vision"]
        image = Image.open(io.BytesIO(png)).convert("RGB")
        if image.size != (vision["width"], vision["height"]):
            raise SystemExit(f"the picture is not {vision['width']} x {vision['height']}")
        pixels = np.asarray(image).astype(np.float64)
        pixels = pixels * (1 if steps["scale"] is None else steps["scale"])
        if steps["mean"] is not None:
            pixels = (pixels - np.array(steps["mean"])) / np.array(steps["std"])
        return self.call("vision", {"pixels": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0]

    def call(self, role, given):
        """Run a graph; the backend keeps the cache. Logits [V], or what a graph without a cache gives."""
        graph = self.graphs[role]
        feeds = {
            port["name"]: np.ascontiguousarray(given[port["role"]], port["dtype"])
            for port in graph["inputs"]
            if port.get("layer") is None
        }
        found = self.backend.run(role, feeds)
        return found[0, -1] if role in ("prefill", "decode") else found


def answer(driver, case, began, loaded):
    """One line: a case of golden.json, with the logits that it lists."""
    wanted = {listed["step"]: listed["ids"] for listed in case["logits"]}
    png = case.get("picture_png")
    run = driver.generate(case["prompt"], case["max_new_tokens"], base64.b64decode(png) if png else None)
    tokens, logits, times, reason = [], [], [], None
    while reason is None:
        try:
            token, found = next(run)
        except StopIteration as end:
            reason = end.value
            continue
        times.append(time.perf_counter() - began)
        if len(tokens) in wanted:
            ids = wanted[len(tokens)]
            logits.append({"step": len(tokens), "ids": ids, "values": [float(v) for v in found[ids]]})
        tokens.append(token)
    steps = len(times) - 1
    return {
        "name": case.get("name"),
        "tokens": tokens,
        "finish_reason": reason,
        "logits": logits,
        "load_ms": 1e3 * loaded,
        "ttft_ms": 1e3 * times[0],
        "tpot_ms": 1e3 * (times[-1] - times[0]) / steps if steps else None,
        "peak_rss_mb": peak(),
        "versions": driver.backend.versions,
    }


def peak():
    status = Path("/proc/self/status")
    found = (
        [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if status.is_file()
        else []
    )
    return int(found[0].split()[1]) * 1024 / 1e6 if found else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--token-ids")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    began = time.perf_counter()
    driver = Driver(FOLDER)
    loaded = time.perf_counter() - began
    if args.golden:
        cases = json.loads(args.golden.read_text())["cases"]
    elif args.token_ids:
        ids = [int(token) for token in args.token_ids.split(",")]
        cases = [{"prompt": ids, "max_new_tokens": args.max_new_tokens, "logits": []}]
    else:
        parser.error("give --golden or --token-ids")
    for case in cases:
        print(json.dumps(answer(driver, case, time.perf_counter(), loaded)), flush=True)


if __name__ == "__main__":
    main()
