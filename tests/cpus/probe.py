"""What a CPU makes of the graphs that cases.py wrote: one line of JSON.

    python tests/cpus/probe.py FOLDER

Needs numpy, ONNX Runtime and our runtime package, and no more, so that it runs wherever they do.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.cpus.rounding import rounding
from tests.cpus.sums import PRECISE, difference

NEW_TOKENS = 32


@dataclass(frozen=True)
class Product:
    """One product form: sizes of it, and in how many each number is equal.

    wrong: what is wrong with the first of the rest.
    """

    sizes: int
    exact: int
    wrong: str | None


@dataclass(frozen=True)
class Found:
    """What was found of one CPU.

    products: by form. full_range, precise: whether codes over the full range are exact, and with kernels that
    do not saturate. rounding: of activations, by the precision of weights in blocks. tokens: by bundle, of
    each prompt.
    """

    features: list[str]
    products: dict[str, Product]
    full_range: bool
    precise: bool
    rounding: dict[str, str]
    tokens: dict[str, list[list[int]]]

    @classmethod
    def from_json(cls, line: str) -> Found:
        raw: dict[str, Any] = json.loads(line)
        return cls(**raw | {"products": {form: Product(**p) for form, p in raw["products"].items()}})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def features() -> list[str]:
    """Instruction sets of this CPU, or of the one that is emulated, by numpy's names."""
    found: dict[str, bool] = np._core._multiarray_umath.__cpu_features__
    return sorted(name for name, there in found.items() if there)


def product(folder: Path) -> Product:
    """A form, of which the folder holds a case of each size."""
    exact, wrong = 0, None
    cases = sorted(folder.iterdir())
    for case in cases:
        found = difference(case)
        if found is None:
            exact += 1
        else:
            wrong = wrong or f"{case.name}: {found}"
    return Product(len(cases), exact, wrong)


def tokens(bundle: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy ones, on one thread."""
    from stillgraph import load  # all else here needs none of ours

    engine = load(bundle, threads=1, compiled=False)
    return [[step.token for step in engine.stream(ids, max_new_tokens=NEW_TOKENS)] for ids in prompts]


def probe(folder: Path) -> Found:
    prompts = json.loads((folder / "prompts.json").read_text(encoding="ascii"))
    return Found(
        features=features(),
        products={form.name: product(form) for form in sorted((folder / "products").iterdir())},
        full_range=difference(folder / "full-range") is None,
        precise=difference(folder / "full-range", PRECISE) is None,
        rounding={form.name: rounding(form) for form in sorted((folder / "rounding").iterdir())},
        tokens={bundle.name: tokens(bundle, prompts) for bundle in sorted((folder / "bundles").iterdir())},
    )


if __name__ == "__main__":
    print(probe(Path(sys.argv[1])).to_json())
