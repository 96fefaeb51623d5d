"""A bundle has one chat template: the one that transformers renders a chat with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stillgraph.chat_template import read_template
from stillgraph.exporter.bundle import tokenizer_files
from stillgraph.tokenizer import Text
from tests.export.bundle.tokenizer_styles import PLAIN, byte_level, publish, put, ship

Refused = Callable[..., Any]
CHAT = [{"role": "user", "content": "Hello"}]
DEFAULT, OTHER = "{{ bos_token }}default{{ messages[0].content }}", "other"
NAMED = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": DEFAULT}]
TEMPLATES: dict[str, dict[str, Any]] = {
    "in the config": {"tokenizer_config.json": PLAIN | {"chat_template": DEFAULT}},
    "several in the config": {"tokenizer_config.json": PLAIN | {"chat_template": NAMED}},
    "a file": {"chat_template.jinja": DEFAULT},
    "a file before the config": {
        "chat_template.jinja": DEFAULT, "tokenizer_config.json": PLAIN | {"chat_template": OTHER}
    },
    "several files": {
        "chat_template.jinja": DEFAULT,
        "additional_chat_templates/tool_use.jinja": OTHER,
        "tokenizer_config.json": PLAIN | {"chat_template": OTHER},
    },
    "a file among several": {"additional_chat_templates/default.jinja": DEFAULT},
}  # fmt: skip


@pytest.mark.parametrize("style", TEMPLATES)
def test_one_chat_template_is_shipped(tmp_path: Path, style: str) -> None:
    source = publish(tmp_path / "source", byte_level())
    put(source, TEMPLATES[style])
    bundle = ship(source)
    text, theirs = Text(bundle), AutoTokenizer.from_pretrained(source)
    expected = theirs.apply_chat_template(CHAT, tokenize=False)
    assert expected == "<bos>defaultHello"
    assert read_template(bundle, text.special_tokens).render(CHAT) == expected
    assert (bundle / "chat_template.jinja").read_text() == DEFAULT
    assert "chat_template" not in (bundle / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("sees", "beside", "expected"), [(False, False, OTHER), (True, True, OTHER), (False, True, DEFAULT)]
)
def test_a_processors_template(tmp_path: Path, sees: bool, beside: bool, expected: str) -> None:
    """transformers' tokenizers do not read chat_template.json, and its processors read nothing else."""
    source = publish(tmp_path / "source", byte_level(), chat_template={"chat_template": OTHER})
    if beside:
        put(source, {"chat_template.jinja": DEFAULT})
    assert AutoTokenizer.from_pretrained(source).chat_template == (DEFAULT if beside else None)
    assert (ship(source, sees) / "chat_template.jinja").read_text() == expected


def test_templates_without_a_default(tmp_path: Path, caplog: Any) -> None:
    source = publish(tmp_path / "source", byte_level(), tokenizer_config=PLAIN | {"chat_template": NAMED[:1]})
    bundle = ship(source)
    assert not (bundle / "chat_template.jinja").exists()
    assert "chat_template" not in (bundle / "tokenizer_config.json").read_text()
    assert "none is the default" in caplog.text


def test_a_template_that_does_not_parse_is_kept(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", byte_level())
    put(source, {"chat_template.jinja": "{% if %}"})
    assert (ship(source) / "chat_template.jinja").read_text() == "{% if %}"


def test_a_template_rendered_otherwise_is_refused(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "source", byte_level())
    put(source, {"chat_template.jinja": DEFAULT})
    monkeypatch.setattr(tokenizer_files, "read_template", lambda folder, names: read_template(folder, {}))
    with refused("read tokenizer", "<bos>default", "transformers"):
        ship(source)
