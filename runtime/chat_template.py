"""Chat templates, rendered as transformers' `apply_chat_template` renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from stillgraph.errors import StillgraphError, first_line
from stillgraph.messages import Message
from stillgraph.tokenizer import read_json

STEP, JOIN = "stillgraph_step", "stillgraph_join"  # names that no template has
MOST_STEPS = 200_000  # a fifth of a second
MOST_CHARACTERS = 16_000_000
MOST_ASKED = 100_000  # a width, an indent, a count
MOST_WRAPPED = 100_000  # characters: wrapping takes time that is quadratic in them
SIZING = ("batch", "center", "format", "indent", "replace", "slice", "tojson", "truncate", "wordwrap")
METHODS = ("expandtabs", "join", "ljust", "rjust", "zfill")  # of texts, besides those of these names
WIDTH = re.compile(r"\d+")
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
            self._template = _Limited().from_string(source)
        except Exception as error:  # of the parser, of deep nesting, of Python's own compiler
            remedy = "correct chat_template.jinja in the bundle or use a plain prompt"
            problem = f"it is not valid ({first_line(error)})"
            raise StillgraphError("read chat template", problem, remedy) from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as text. It has the begin token already: encode it without adding special tokens.

        messages: dicts with role and content, JSON values only; variables: whatever else the template reads,
        such as `tools`. Raises StillgraphError where the template refuses the messages, and where it takes
        over `MOST_STEPS` or makes a text of over `MOST_CHARACTERS`.
        """
        chat = [
            _reasoning({key: value for key, value in message.items() if value is not None})
            for message in messages
        ]
        named = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            text = self._template.render(
                messages=chat, add_generation_prompt=add_generation_prompt, **named, **{STEP: _steps()}
            )
        except Exception as error:  # a template can raise any
            remedy = "change the messages, or use a plain prompt"
            problem = f"it refuses the messages ({first_line(error)})"
            raise StillgraphError("render chat template", problem, remedy) from error
        return text


def read_template(bundle: Path, special_tokens: Mapping[str, str]) -> Template:
    """The bundle's chat_template.jinja, or tokenizer_config.json's template. Raises StillgraphError."""
    path = bundle / "chat_template.jinja"
    if path.is_file():
        try:
            return Template(path.read_text(encoding="utf-8"), special_tokens)
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{path} cannot be read ({first_line(error)})"
            raise StillgraphError("read chat template", problem, "export the bundle again") from error
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


class _Limited(ImmutableSandboxedEnvironment):
    """The environment of transformers' `_compile_jinja_template`, with limits: templates are untrusted code.

    A step is counted in each turn of a loop and in each call of a macro. What is joined, added, repeated,
    formatted, replaced or raised to a power is looked at before it is made.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters[JOIN] = _joined
        for name in SIZING:
            self.filters[name] = _checked(name, self.filters[name])
        del self.globals["lipsum"]  # any number of paragraphs, at random
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        found: Iterator[Any] = template.find_all((nodes.For, nodes.Macro))
        for node in found:
            step = nodes.Call(nodes.Name(STEP, "load"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        guarded: nodes.Template = _guarded(template)
        return guarded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, Sized) else value for value in (left, right)]
        if operator == "*" and any(isinstance(value, Sized) for value in (left, right)):
            _check_size(sizes[0] * sizes[1])
        elif operator == "+" and all(isinstance(value, Sized) for value in (left, right)):
            _check_size(sizes[0] + sizes[1])
        elif operator == "**":
            _check_size(int(left).bit_length() * right if isinstance(left, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _check_call("format", left, *(right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def call(*args: Any, **kwargs: Any) -> Any:  # a template may name an argument `self`
        self, context, called, *rest = args
        subject, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(subject, str) and (name in SIZING or name in METHODS):
            _check_call(name, subject, *rest, *kwargs.values())
        return super(_Limited, self).call(context, called, *rest, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """Called for what may be the method `format` of a text."""
        made, subject = super().wrap_str_format(value), getattr(value, "__self__", "")
        if made is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> Any:
            _check_call("format", subject, *args, *kwargs.values())
            return made(*args, **kwargs)

        return formatted


def _guarded(node: Any) -> Any:
    """A tree with `a ~ b` as a filter that looks at the length of what it joins."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _guarded(value))
        elif isinstance(value, list):
            setattr(node, name, [_guarded(item) if isinstance(item, nodes.Node) else item for item in value])
    if isinstance(node, nodes.Concat):
        return nodes.Filter(nodes.List(node.nodes), JOIN, [], [], None, None).set_lineno(node.lineno)
    return node


def _joined(parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _checked(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given first."""

    @wraps(filter_)  # with jinja2's marks of what else it takes
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in args if not isinstance(value, Environment | nodes.EvalContext)]
        _check_call(name, *given, *kwargs.values())
        return filter_(*args, **kwargs)

    return call


def _check_call(name: str, subject: Any, *values: Any) -> None:
    """Look at what a filter or a method of that name is given, before it makes a text of it."""
    numbers = [value for value in values if isinstance(value, int)]
    if name == "format":
        nested = "*" in subject or "{" in subject.partition(":")[2]  # a width may be one of the values
        numbers = [*(numbers if nested else []), *(int(width[:20]) for width in WIDTH.findall(subject))]
    if max(numbers, default=0) > MOST_ASKED:
        raise TemplateError(f"it asks {name} for {max(numbers)}, over {MOST_ASKED}")
    if name == "wordwrap" and len(subject) > MOST_WRAPPED:
        raise TemplateError(f"it wraps a text of over {MOST_WRAPPED} characters")
    if name == "replace" and len(values) >= 2 and isinstance(values[0], str):
        _check_size(len(subject) + str(subject).count(values[0]) * len(values[1]))
    elif name == "join" and isinstance(subject, str) and isinstance(values[0], Sized):
        _check_size(len(subject) * len(values[0]))


def _check_size(characters: float) -> None:
    if characters > MOST_CHARACTERS:
        raise TemplateError(f"it makes a text of over {MOST_CHARACTERS} characters")


def _steps() -> Callable[[], None]:
    left = iter(range(MOST_STEPS))

    def step() -> None:
        if next(left, None) is None:
            raise TemplateError(f"it takes over {MOST_STEPS} steps")

    return step


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
