"""Manifests, chat templates and arguments that mean harm: right, or one sentence, and soon."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from stillgraph import load
from stillgraph.chat_template import Template
from stillgraph.engine import Engine
from tests.faults import mutate
from tests.faults.damages import hard_copy
from tests.faults.outcome import Outcome, Trial, outcome
from tests.faults.subjects import CHAT, FOLDER, PROMPTS, expected, open_, tokens

FRAGMENTS = (
    "{{ 1 / 0 }}",
    "{% for a in range(10 ** 9) %}x{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% endfor %}",
    "{% for %}",
    "{{",
    "%}",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "\ud800",
    "{{ messages[0].content.split('') }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ lipsum(n=10 ** 7) }}",
    "{{ 'a'.replace('', 'b' * 10 ** 6) }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ dict(**1) }}",
    "{{ namespace(self=1) }}",
    "{{ strftime_now('%') }}",
    "{{ range(10 ** 9) | list | length }}",
    "{{ ('a' * 10 ** 6) | wordwrap(1) | length }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ cycler() }}",
    "{{ 'a' | indent(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ [messages] | sum }}",
    "{{ joiner(1)(2) }}",
    "{{ '%s' | format(messages) }}",
    "{{ messages | map(attribute='x' * 9) | list }}",
    "{{ 1 << 10 ** 12 }}",
)


def manifests(seed: int, scratch: Path) -> Trial:
    """What a manifest says may be another model's: then other tokens are right."""
    manifest = json.loads((FOLDER / "int4" / "manifest.json").read_text(encoding="utf-8"))
    copy = hard_copy(FOLDER / "int4", scratch / "copy")
    return manifest_trial(copy, manifest, seed, PROMPTS[2])


def manifest_trial(bundle: Path, manifest: dict[str, Any], seed: int, prompt: Any) -> Trial:
    """bundle: its manifest.json is replaced in each trial."""
    prompt = load(bundle).ids(prompt) if isinstance(prompt, str) else prompt
    right = [step.token for step in load(bundle).stream(prompt, max_new_tokens=4, stop_tokens=())]

    def trial(number: int) -> Outcome:
        random = Random(f"{seed} manifests {number}")
        path = bundle / "manifest.json"
        path.unlink()
        path.write_text(mutate.document(manifest, random), encoding="utf-8", errors="surrogatepass")

        def call() -> bool:
            with load(bundle, threads=1) as engine:
                steps = engine.stream(prompt, max_new_tokens=4, stop_tokens=())
                return [step.token for step in steps] == right

        return outcome(call, f"trial {number}, manifest")

    return trial


def templates(seed: int, scratch: Path) -> Trial:
    valid = (FOLDER / "int4" / "chat_template.jinja").read_text(encoding="utf-8")
    return template_trial(valid, seed)


def template_trial(valid: str, seed: int) -> Trial:
    def trial(number: int) -> Outcome:
        source = mutate.text(valid, FRAGMENTS, Random(f"{seed} templates {number}"))
        # Any text is right: what the template says is its own business.
        return outcome(
            lambda: isinstance(Template(source, {"bos_token": "<s>"}).render(CHAT), str), f"trial {number}"
        )

    return trial


def arguments(seed: int, scratch: Path) -> Trial:
    right = tokens(expected("int4", "compiled")[2])
    return argument_trial(open_("int4"), PROMPTS[2], right, seed)


def argument_trial(engine: Engine, prompt: Any, right: list[int], seed: int) -> Trial:
    """right: at least 8 greedy tokens of the prompt."""
    values = {
        "max_new_tokens": (1, 3, 8), "temperature": (0.0, 1.0, 1e-30), "top_k": (None, 1, 2, 10**9),
        "top_p": (None, 1.0, 1e-9), "min_p": (None, 0.0, 1.0), "repetition_penalty": (None, 1e-6, 1e6),
        "seed": (None, 0, 2**70), "stop": (None, "", "a", ["b"]), "stop_tokens": (None, (), [1]),
        "top_logprobs": (0, 1, 10**9), "images": ((), ["none.png"]),
    }  # fmt: skip

    def trial(number: int) -> Outcome:
        random = Random(f"{seed} arguments {number}")
        chosen = random.sample(sorted(values), random.choice([1, 1, 2, 3]))
        options: dict[str, Any] = {"max_new_tokens": 8, "stop_tokens": ()}
        for name in chosen:
            options[name] = mutate.value(random) if random.random() < 0.7 else random.choice(values[name])
        given = prompt if random.random() < 0.7 else _prompt(random)
        what = f"trial {number}, {given!r:.60}, {options!r:.200}"

        def call() -> bool:
            steps = islice(engine.stream(given, **options), 8)  # it may have been asked for 2**64
            made = [step.token for step in steps]
            plain = given is prompt and not set(chosen) & {"temperature", "repetition_penalty"}
            return made == right[: len(made)] if plain else bool(made)

        found = outcome(call, what)
        if found.kind != "right":
            return found
        after = [step.token for step in engine.stream(prompt, max_new_tokens=4, stop_tokens=())]
        return found if after == right[:4] else Outcome("wrong", f"after {what}")

    return trial


def _prompt(random: Random) -> Any:
    if random.random() < 0.5:
        return mutate.value(random)
    role, content = mutate.value(random), mutate.value(random)
    return random.choice(
        [[{"role": "user", "content": content}], [{"role": role, "content": "Hi"}], [1, 2, role], [[1], 2],
         [{"role": "user", "content": [{"type": role, "text": content}]}]]
    )  # fmt: skip
