"""Chat templates, rendered as transformers' `apply_chat_template` renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from stillgraph.errors import StillgraphError
from stillgraph.messages import Message
from stillgraph.tokenizer import read_json

IMAGE_PART = re.compile(r"""(type['"]?\]?\s*==|equalto['"]\s*,)\s*['"]image['"]""")


class Template:
    """A chat template with the special tokens it may name.

    takes_parts: whether it asks for contents that are lists of parts, of which some are images.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises StillgraphError for a template that does not parse."""
        self._special_tokens = dict(special_tokens)
        self.takes_parts = bool(IMAGE_PART.search(source))
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            remedy = "correct chat_template.jinja in the bundle or use a plain prompt"
            raise StillgraphError("read chat template", f"it is not valid ({error})", remedy) from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as text. It has the begin token already: encode it without adding special tokens.

        messages: dicts with role and content, JSON values only; variables: whatever else the template reads,
        such as `tools`. Raises StillgraphError where the template refuses the messages.
        """
        chat = [
            _reasoning({key: value for key, value in message.items() if value is not None})
            for message in messages
        ]
        named = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **named)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            remedy = "change the messages, or use a plain prompt"
            raise StillgraphError(
                "render chat template", f"it refuses the messages ({error})", remedy
            ) from error


def read_template(bundle: Path, special_tokens: Mapping[str, str]) -> Template:
    """The bundle's chat_template.jinja, or tokenizer_config.json's template. Raises StillgraphError."""
    path = bundle / "chat_template.jinja"
    if path.is_file():
        return Template(path.read_text(encoding="utf-8"), special_tokens)
    source = read_json(bundle / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((each["template"] for each in source if each.get("name") == "default"), None)
    if not source:
        problem = f"{bundle} has no chat template"
        raise StillgraphError(
            "render chat template", problem, "use a plain prompt, or a checkpoint made for chat"
        )
    return Template(source, special_tokens)


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """`dict(...)` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute `self`
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: its name begins with an underscore")


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers' `_compile_jinja_template`: templates are untrusted code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message's reasoning under the names that templates read, whichever it came under."""
    names = ("reasoning_content", "thinking", "reasoning")
    text = next((message[name] for name in names if name in message), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}
