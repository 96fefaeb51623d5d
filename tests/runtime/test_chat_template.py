"""Chat templates against transformers' `apply_chat_template`, on the styles in use."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stillgraph.chat_template import Template, read_template
from stillgraph.errors import StillgraphError

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {% generation %}{{ message['content'] }}{% endgeneration %}
    {% else %}
        {{ message['content'] }}
    {% endif %}
    {{- '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}
"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(system='', count=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- ns.system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == 'ipython' %}{%- break %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message.content is mapping or message.content is iterable and message.content is not string %}
        {{- message.content | tojson(indent=2) }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"gemma": GEMMA, "chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL}
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>"}

USER = {"role": "user", "content": " Who <b>are</b> you? \n"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [
        USER,
        {"role": "assistant", "content": "Me. \u20ac"},
        {"role": "user", "content": "Really?", "name": None},
    ],
    [
        {"role": "system", "content": "s", "name": None},
        USER,
        {"role": "assistant", "content": "a", "thinking": "hm"},
        USER,
    ],
]


def theirs(template: str, chat: list, **options) -> str:
    backend = Tokenizer(models.BPE(vocab={"<bos>": 0, "<eos>": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompted", [True, False])
def test_a_chat_renders_as_in_transformers(style, chat, prompted) -> None:
    ours = Template(TEMPLATES[style], NAMES).render(chat, add_generation_prompt=prompted)
    assert ours == theirs(TEMPLATES[style], chat, add_generation_prompt=prompted)


def test_content_parts_render_as_in_transformers() -> None:
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": " What is <this>? "}]
    chat = [{"role": "user", "content": parts}]
    for style in ("gemma", "llama"):
        assert Template(TEMPLATES[style], NAMES).render(chat) == theirs(
            TEMPLATES[style], chat, add_generation_prompt=True
        )


def test_tools_render_as_in_transformers() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & c \u20ac"}}]
    ours = Template(CHATML, NAMES).render([USER], tools=tools)
    assert ours == theirs(CHATML, [USER], tools=tools, add_generation_prompt=True)
    assert "a < b & c \u20ac" in ours


HELPERS = [
    "{{ messages | tojson(indent=1, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':'), ensure_ascii=True) }}",
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a']) | tojson }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ missing }}|{{ tools is none }}|{{ documents is none }}|{{ eos_token }}",
    "  {% if true %}\n  kept\n  {% endif %}\n",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("source", HELPERS)
def test_helpers_work_as_in_transformers(source) -> None:
    assert Template(source, NAMES).render(CHATS[3]) == theirs(source, CHATS[3], add_generation_prompt=True)


REFUSED = [
    (GEMMA, [USER, USER], "roles must alternate"),
    (MISTRAL, [USER, USER], "roles must alternate"),
    ("{{ messages.append(1) }}", [USER], "append"),
    ("{{ ''.__class__.__mro__ }}", [USER], "__mro__|unsafe"),
    ("{{ namespace(_a=1) }}", [USER], "_a"),
    ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", [USER], "__class__"),
    ("{{ messages[0].content + 1 }}", [USER], "concatenate"),
    ("{{ missing.attribute }}", [USER], "undefined"),
]


@pytest.mark.parametrize(("source", "chat", "said"), REFUSED)
def test_what_a_template_refuses_is_one_sentence(source, chat, said) -> None:
    with pytest.raises(Exception, match=said):
        theirs(source, chat)
    with pytest.raises(StillgraphError, match=said):
        Template(source, NAMES).render(chat)


def test_a_template_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(StillgraphError, match="read chat template"):
        read_template(tmp_path, NAMES)


NAMED = [{"name": "tool", "template": "no"}, {"name": "default", "template": "text"}]


@pytest.mark.parametrize("stored", ["text", NAMED])
def test_a_template_inside_the_tokenizers_config(tmp_path: Path, stored) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    assert read_template(tmp_path, NAMES).render([USER]) == "text"


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(StillgraphError, match="has no chat template; use a plain prompt"):
        read_template(tmp_path, NAMES)


def test_todays_date() -> None:
    rendered = Template(LLAMA, NAMES).render([USER])
    assert datetime.now().strftime("%b %Y") in rendered


LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "no end": (LOOP * 3 + "{% endfor %}" * 3, "over 200000 steps"),
    "no end and no loop": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "over 200000 steps",
    ),
    "doubled": (
        "{% set t = namespace(x='ab') %}{% for i in range(60) %}{% set t.x = t.x ~ t.x %}{% endfor %}",
        "over 16000000 characters",
    ),
    "added": (
        "{% set t = namespace(x='ab') %}{% for i in range(26) %}{% set t.x = t.x + t.x %}{% endfor %}",
        "over 16000000 characters",
    ),
    "repeated": ("{{ 'a' * 10 ** 10 }}", "over 16000000 characters"),
    "a width": ("{{ '%20000000d' % 1 }}", "asks format for 20000000"),
    "a width that is given": ("{{ '%*d' % (20000000, 1) }}", "asks format for 20000000"),
    "a width of format": ("{{ '{:>20000000}'.format(1) }}", "asks format for 20000000"),
    "a width of format that is given": ("{{ '{:>{}}'.format(1, 20000000) }}", "asks format for 20000000"),
    "a width of a filter": ("{{ 'a' | center(20000000) | length }}", "asks center for 20000000"),
    "a width of a method": ("{{ 'a'.ljust(20000000) }}", "asks ljust for 20000000"),
    "an indent": ("{{ messages | tojson(indent=10000000) }}", "asks tojson for 10000000"),
    "replaced": ("{{ ('a' * 9999).replace('', 'b' * 9999) }}", "over 16000000 characters"),
    "replaced by a filter": ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}", "over 16000000 characters"),
    "joined": ("{{ ('a' * 9999).join(range(9999) | map('string') | list) }}", "over 16000000 characters"),
    "wrapped": ("{{ ('a' * 200000) | wordwrap(1000) }}", "wraps a text of over 100000"),
    "paragraphs at random": ("{{ lipsum(n=10) }}", "'lipsum' is undefined"),
    "a list repeated": ("{{ 10 ** 10 * [1] }}", "over 16000000 characters"),
    "a large power": ("{{ 7 ** (10 ** 9) }}", "over 16000000 characters"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
    "an overflow": ("{{ 2.0 ** 5000 }}", "out of range"),
    "a lookup": ("{{ messages[7].content }}", "no element 7"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_fails_in_any_way_is_one_sentence(refused, name) -> None:
    source, said = HOSTILE[name]
    template = Template(source, {})
    with refused("render chat template", said):
        template.render([{"role": "user", "content": "a"}])


def test_deep_nesting_does_not_parse(refused) -> None:
    with refused("read chat template", "not valid"):
        Template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", {})


def test_joining_is_what_it_was() -> None:
    template = Template(
        "{{ 'a' ~ 1 ~ none ~ 2.5 ~ undefined_name ~ [1, 'b'] ~ (2 * 3) ~ 'c' * 2 ~ 2 ** 3 }}", {}
    )
    assert template.render([]) == "a1None2.5[1, 'b']6cc8"


def test_large_numbers_are_written_as_ever() -> None:
    number = 1700000000
    source = (
        "{{ n | tojson }} {{ '%d' % n }} {{ '{:,}'.format(n) }} {{ '%s'|format(n) }}"
        " {{ 'a b'.replace(' ', '-') }}"
        "{% macro same(x) %} {{ x }}{% endmacro %}{{ same(n) }} {{ '%-3s|%5.2f' % ('x', 1.5) }} {{ n + n }}"
        " {{ ','.join(['a', 'b']) }} {{ 'a b' | wordwrap(2) }} {{ 'a' + 'b' }}"
    )
    expected = f"{number} {number} 1,700,000,000 {number} a-b {number} x  | 1.50 {2 * number} a,b a\nb ab"
    assert Template(source, {}).render([], n=number) == expected


def test_bytes_that_are_no_text(tmp_path, refused) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ 1 }}\xff\xfe")
    with refused("read chat template", "cannot be read", "export the bundle again"):
        read_template(tmp_path, {})
