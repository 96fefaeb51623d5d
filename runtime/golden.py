"""A bundle's golden.json: token ids and logits of PyTorch, with which any runtime can be checked.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from stillgraph.errors import StillgraphError, first_line, wrong_field
from stillgraph.manifest import Precision, Target
from stillgraph.row import FinishReason
from stillgraph.session import Array
from stillgraph.spec import Frozen

GOLDEN = "golden.json"
STAGE = "read golden"
AGAIN = "run 'stillgraph validate' on the bundle"
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Tolerance(Frozen):
    """What may differ, over the largest magnitude of the logits listed at a step.

    logits: the error of one. near_tie: a token may be another one whose logit is this little below the best;
    the text after it is another then, and is not compared.
    """

    logits: Share
    near_tie: Share


class StepLogits(Frozen):
    """Logits from which the token of a step was chosen, before any processor: those of some ids.

    The best come first, the best of all at the head.
    """

    step: NonNegativeInt
    ids: tuple[NonNegativeInt, ...]
    values: tuple[Finite, ...]

    @model_validator(mode="after")
    def _one_value_an_id(self) -> Self:
        if not self.ids or len(set(self.ids)) != len(self.ids) or len(self.ids) != len(self.values):
            raise ValueError(f"{len(self.ids)} ids, which may be twice, and {len(self.values)} values")
        if max(self.values) != self.values[0] or not self.scale:
            raise ValueError("the first value is not the best, or all are 0")
        return self

    @property
    def scale(self) -> float:
        """The largest magnitude of them."""
        return max(map(abs, self.values))


class Case(Frozen):
    """A prompt, and what PyTorch makes of it: always the best token, with no sampling defaults applied.

    prompt: ids as they are given to the graphs, a picture's image tokens among them; picture_png: base64 of
    a PNG that already has the size of the model's input; tokens: those given out; logits: of some steps, all
    those among them where another token is within the tolerance of the best.
    """

    name: str
    prompt: tuple[NonNegativeInt, ...] = Field(min_length=1)
    picture_png: str | None = None
    max_new_tokens: PositiveInt
    tokens: tuple[NonNegativeInt, ...] = Field(min_length=1)
    finish_reason: FinishReason
    logits: tuple[StepLogits, ...]

    @model_validator(mode="after")
    def _logits_choose_the_tokens(self) -> Self:
        if len(self.tokens) > self.max_new_tokens:
            raise ValueError(f"{len(self.tokens)} tokens are more than {self.max_new_tokens}")
        for listed in self.logits:
            if listed.step >= len(self.tokens) or listed.ids[0] != self.tokens[listed.step]:
                raise ValueError(f"the best of step {listed.step} is not its token")
        return self


class Golden(Frozen):
    """`golden.json`. Unknown keys are errors; another format version is refused."""

    format_version: Literal[1] = 1
    precision: Precision
    target: Target
    tolerance: Tolerance
    cases: tuple[Case, ...]

    def to_json(self) -> str:
        """A line a step, so that two of them can be compared by eye."""
        head = self.model_dump(mode="json", exclude={"cases"})
        cases = [_case_json(case) for case in self.cases]
        return json.dumps(head, indent=1)[:-2] + ',\n "cases": [\n' + ",\n".join(cases) + "\n ]\n}\n"


def _case_json(case: Case) -> str:
    said = case.model_dump(mode="json", exclude={"logits"})
    lines = [f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in said.items()]
    steps = [f"    {listed.model_dump_json()}" for listed in case.logits]
    listed = '   "logits": [\n' + ",\n".join(steps) + "\n   ]"
    return "  {\n" + ",\n".join([*lines, listed]) + "\n  }"


def read(bundle: Path) -> Golden:
    """Read and check a bundle's golden.json. Raises StillgraphError."""
    path = bundle / GOLDEN
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StillgraphError(STAGE, f"{bundle} has no {GOLDEN}", AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StillgraphError(STAGE, f"{path} is not JSON ({first_line(error)})", AGAIN) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != 1:
        problem = f"{path} has format version {version!r} and this stillgraph understands 1"
        raise StillgraphError(STAGE, problem, AGAIN)
    try:
        return Golden.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise StillgraphError(STAGE, f"{path}: {wrong_field(error, 'golden')}", AGAIN) from error


@dataclass(frozen=True)
class Answer:
    """What a runtime makes of a case. logits: by step, [V] or by id; those of some steps, or none."""

    tokens: tuple[int, ...]
    finish_reason: str
    logits: Mapping[int, Array | Mapping[int, float]]


@dataclass(frozen=True)
class Compared:
    """A runtime's answer beside a case.

    equal: tokens that are the same from the first on; near_tie: the step at which two tokens were about
    equal and the other one was taken, after which nothing is compared; steps: those whose logits were
    compared; worst: the largest error of a logit, in terms of the tolerance's; problems: a sentence each,
    none where the answer passes.
    """

    case: str
    equal: int
    near_tie: int | None
    steps: int
    worst: float
    problems: tuple[str, ...]


def compare(case: Case, answer: Answer, tolerance: Tolerance) -> Compared:
    """Hold a runtime's answer to a case."""
    pairs = zip(case.tokens, answer.tokens, strict=False)
    shorter = min(len(case.tokens), len(answer.tokens))
    equal = next((step for step, (one, other) in enumerate(pairs) if one != other), shorter)
    listed = {logits.step: logits for logits in case.logits}
    problems, near_tie = list[str](), None
    if equal < shorter:
        if _nearly_best(answer.tokens[equal], listed.get(equal), tolerance):
            near_tie = equal
        else:
            problems.append(f"token {equal} is {answer.tokens[equal]}, not {case.tokens[equal]}")
    elif len(case.tokens) != len(answer.tokens):
        problems.append(f"{len(answer.tokens)} tokens were given out, not {len(case.tokens)}")
    elif answer.finish_reason != case.finish_reason:
        problems.append(f"it ended with {answer.finish_reason!r}, not {case.finish_reason!r}")
    errors = dict(_errors(case, answer, equal))
    worst_step = max(errors, key=lambda step: (errors[step] != errors[step], errors[step]), default=0)
    worst = errors.get(worst_step, 0.0)
    if not worst <= tolerance.logits:  # which NaN is not
        problems.append(f"logits of step {worst_step} are off by {worst:.2g}, over {tolerance.logits:g}")
    return Compared(case.name, equal, near_tie, len(errors), worst, tuple(problems))


def _nearly_best(token: int, listed: StepLogits | None, tolerance: Tolerance) -> bool:
    if listed is None or token not in listed.ids:
        return False
    value = listed.values[listed.ids.index(token)]
    return listed.values[0] - value < tolerance.near_tie * listed.scale


def _errors(case: Case, answer: Answer, equal: int) -> Iterator[tuple[int, float]]:
    """The largest error of each listed step before which all tokens are the same, where there are logits."""
    for listed in case.logits:
        if listed.step <= equal and (found := answer.logits.get(listed.step)) is not None:
            differences = [abs(float(found[i]) - v) for i, v in zip(listed.ids, listed.values, strict=True)]
            yield listed.step, max(differences, key=lambda error: (error != error, error)) / listed.scale
