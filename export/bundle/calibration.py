"""The calibration of an export: on which texts, of which weights, and where it goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from stillgraph.exporter.bundle.tokenizer_files import TOKENIZER
from stillgraph.exporter.calibration import NONE, SAMPLES, calibration_of
from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import ExportConfig, Say
from stillgraph.exporter.ir.fold_weights import Weight
from stillgraph.exporter.precisions import CALIBRATED, PRECISIONS, QUANTIZED
from stillgraph.exporter.quantize.calibrate import calibrate, products
from stillgraph.exporter.quantize.layouts import Part
from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.quantize.rounded import Rounded
from stillgraph.exporter.quantize.rounding import Format
from stillgraph.exporter.quantize.samples import own_texts
from stillgraph.exporter.quantize.sensitivity import (
    Added,
    Cost,
    choose,
    dearest,
    of_int8_rows,
    of_nearest,
    sensitivity,
)
from stillgraph.exporter.quantize.smoothing import smoothings
from stillgraph.exporter.quantize.text import file_texts
from stillgraph.exporter.smoothing import Smoothing, shipped_smoothings
from stillgraph.manifest import Manifest, Precision, Quantization

ALGORITHM = 7  # another number for other numbers: what an earlier version left is not taken up
BITS = 4  # what 8 bits cost a model is next to nothing
BETTER: Precision = "int8"  # for weights that matter
TOKENS, A_COLUMN = 16384, 12  # at most, and for each column of the widest weight
FEWEST, WORK = 4096, 3e12  # at least, and tokens times weights: more would take too long
MEASURED, SHARE = 2048, 4  # tokens that say which weights matter: at most, and one in so many of all
START, START_KL = 2, 0.05  # tokens of a short prompt, and nats it may lose: a quarter of what is allowed
SAMPLED, READ = 128, 512  # tokens of a text: sampling takes as long as a text is, whatever their number


def begin(
    config: ExportConfig, checkpoint: Checkpoint, former: Manifest | None, folder: Path, say: Say
) -> tuple[ExportConfig, Checkpoint, Calibration | None]:
    """The calibration that an export was asked for, if any, and the export with what is measured to need more
    than others, and the checkpoint with what is smoothed: as in the former bundle, which this one adds to,
    where there is one."""
    how, asked = config.quantization, former.quantization if former else None
    found = shipped_smoothings(folder, former) if former else ()
    if how is None or config.calibrate == NONE:
        return config, checkpoint.smoothed(found), None
    calibration = Calibration(config, checkpoint, how, folder, say)
    smoothed = calibration.checkpoint = checkpoint.smoothed(found if former else calibration.smoothings())
    if how.mixed:
        how = how.model_copy(update={"better": asked.better if asked else calibration.better()})
        calibration.plan = replace(calibration.plan, quantization=how)
    if how.fast_prefill:
        blocked = asked.blocked if asked and asked.fast_prefill else calibration.blocked()
        how = how.model_copy(update={"blocked": blocked})
    config = config.model_copy(update={"quantization": how})
    return config, smoothed, calibration if how.calibration else None


class Calibration:
    """One calibration, and the folder beside the bundle that it works in: a stopped export finds it again.

    folder: with the bundle's tokenizer. Nothing is done before it is asked for.
    """

    def __init__(
        self, config: ExportConfig, checkpoint: Checkpoint, quantization: Quantization, folder: Path, say: Say
    ) -> None:
        self.config, self.checkpoint, self.quantization = config, checkpoint, quantization
        self.plan = StoragePlan(config.target, config.precision, quantization, tied=checkpoint.tied)
        key = [
            ALGORITHM,
            checkpoint.sha256,
            calibration_of(config.calibrate),
            config.target,
            config.precision,
            quantization.model_dump(mode="json"),
        ]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        place = config.place.resolve()
        self._rounded = Rounded(place.with_name(f".{place.name}.calibration-{digest}"))
        self._folder, self._say = folder, say

    def texts(self) -> Tensor:
        return self._rounded.texts(self._texts)

    def smoothings(self) -> tuple[Smoothing, ...]:
        """Scales of channels that move into the weights that read them."""
        return self._rounded.smoothings(lambda: smoothings(self.checkpoint, self._part(), self._say))

    def better(self) -> dict[str, Precision]:
        """Weights that get more bits for the budget, and the precision of them."""
        return dict.fromkeys(self._once("better", self._better), BETTER)

    def blocked(self) -> tuple[str, ...]:
        """Weights that a fast prefill multiplies with in blocks, as without it."""
        return tuple(self._once("blocked", self._blocked))

    def round(self, weights: Iterable[Weight]) -> Rounded:
        """The weights of few bits among `weights` that belong to products of the decoder's layers."""
        forms, known = _forms(weights), products(self.checkpoint)
        wanted = {name: form for name, form in forms.items() if name in known}
        if any(self._rounded.get(name, form) is None for name, form in wanted.items()):
            calibrate(self.checkpoint, wanted, self.texts(), self._rounded, self._say)
        return self._rounded

    def _once(self, name: str, measure: Callable[[], list[str]]) -> list[str]:
        path = self._rounded.folder / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(measure()), encoding="utf-8")
        found: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _blocked(self) -> list[str]:
        ids = self._part()
        starts = ids.flatten()[: ids.numel() // START * START].view(-1, START)
        (costs,) = self._prefill_costs([of_int8_rows], ids)
        # What a short prompt loses is lost in the mean over a text. Blocks of four bits cost it more as well.
        rows, blocks = self._prefill_costs([of_int8_rows, self._of_blocks], starts)
        short = [
            replace(cost, nats=max(0.0, cost.nats - other.nats))
            for cost, other in zip(rows, blocks, strict=True)
        ]
        names = {cost.name for cost in dearest(costs, PRECISIONS[self.config.precision].fast_kl)}
        names |= {cost.name for cost in dearest(short, START_KL)}
        chosen = [cost for cost in costs if cost.name in names]
        numbers = sum(cost.numbers for cost in chosen)
        nats = sum(cost.nats for cost in costs) - sum(cost.nats for cost in chosen)
        line = f"{len(chosen)} of {len(costs)} products of the fast prefill stay in blocks, {numbers} numbers"
        self._say(f"{line}, and the others cost {nats:.3f} nats")
        return _names(chosen)

    def _prefill_costs(self, kinds: Sequence[Added], ids: Tensor) -> list[list[Cost]]:
        def say(line: str) -> None:
            self._say(f"measuring what the fast prefill may round: {line}")

        return [
            [cost for cost in costs if self.plan.precision_of((cost.name,)) in QUANTIZED]
            for costs in sensitivity(self.checkpoint, kinds, ids, say)
        ]

    def _of_blocks(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        precision = self.plan.precision_of((name,))
        return of_nearest(self.plan.form(precision))(name, x, weight) if precision in QUANTIZED else 0 * x

    def _better(self) -> list[str]:
        few, many = (self.plan.form(precision) for precision in (CALIBRATED, BETTER))
        names = {name for name in products(self.checkpoint) if self.plan.precision_of((name,)) == CALIBRATED}

        def say(line: str) -> None:
            self._say(f"measuring which weights matter: {line}")

        (costs,) = sensitivity(self.checkpoint, [of_nearest(few)], self._part(), say)
        costs, how = [cost for cost in costs if cost.name in names], self.quantization
        chosen, bits = choose(costs, few, many, how.budget, how.kl)
        nats = sum(cost.nats for cost in costs) - sum(cost.nats for cost in chosen)
        line = f"{len(chosen)} of {len(costs)} weights get eight bits: {bits:.2f} bits a weight in all, and "
        self._say(f"{line}{nats:.3f} nats that four bits cost")
        return _names(chosen)

    def _part(self) -> Tensor:
        """The texts that say which weights matter."""
        ids = self.texts()
        tokens = measured_for(ids.numel()) if self.quantization.calibration else MEASURED
        return ids[: max(1, tokens // ids.shape[1])]

    def _texts(self) -> Tensor:
        checkpoint, own = self.checkpoint, self.config.calibrate == SAMPLES
        length = min(SAMPLED if own else READ, checkpoint.spec.max_position_embeddings)
        shapes = [tuple(checkpoint.tensors[name].shape()) for name in products(checkpoint)]
        tokens = tokens_for(shapes) if self.quantization.calibration else MEASURED
        texts = -(-tokens // length)
        if own:
            return own_texts(checkpoint, texts, length, self._say)
        tokenizer = Tokenizer.from_file(str(self._folder / TOKENIZER))
        return file_texts(Path(self.config.calibrate), tokenizer, texts, length)


def _names(costs: list[Cost]) -> list[str]:
    return sorted(cost.name.removesuffix(".weight") for cost in costs)


def tokens_for(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many tokens weights of these shapes [N, K] are rounded for."""
    widest, numbers = max(columns for _, columns in shapes), sum(map(math.prod, shapes))
    return min(TOKENS, A_COLUMN * widest, max(FEWEST, int(WORK / numbers)))


def measured_for(tokens: int) -> int:
    """How many of the tokens that weights are rounded for say which weights matter."""
    return min(MEASURED, tokens // SHARE)


def forget(place: Path) -> None:
    """Remove what calibrations for this place have left."""
    real = place.resolve()
    for folder in real.parent.glob(f".{real.name}.calibration-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _forms(weights: Iterable[Weight]) -> dict[str, Format]:
    """By the checkpoint's names; a weight that was worked on before it is stored is left out."""
    return {
        source: weight.matrix.form
        for weight in weights
        if isinstance(weight, Part) and weight.matrix.form.bits == BITS and not weight.matrix.recipe.steps
        for source in weight.matrix.recipe.sources
    }
