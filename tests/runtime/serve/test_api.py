"""The API by the `openai` client: what it says is what `Engine.stream` says, and bad requests are told."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from stillgraph.loading import load
from tests.runtime.serve.serving import Served, serving

PROMPT = "Once"
CHAT: list[Any] = [{"role": "user", "content": "hey"}]
IDS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def steps_of(engine, prompt, **options):
    return list(engine.stream(prompt, **options))


def text_of(steps) -> str:
    return "".join(step.text for step in steps)


SAMPLED = {"temperature": 0.9, "top_p": 0.8, "seed": 7}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_the_engines(client, engine, options, stream) -> None:
    steps = steps_of(engine, PROMPT, max_new_tokens=9, **options)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "extra_body": IDS, **options}
    if stream:
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * len(steps)
        usage, choices = chunks[-1].usage, [chunk.choices[0] for chunk in chunks[:-1]]
    else:
        made = client.completions.create(**asked)
        usage, choices = made.usage, made.choices
        assert choices[0].prompt_token_ids == engine.ids(PROMPT)
    assert [token for choice in choices for token in choice.token_ids] == [step.token for step in steps]
    assert "".join(choice.text for choice in choices) == text_of(steps)
    assert [choice.finish_reason for choice in choices][-1] == steps[-1].finish_reason
    counted = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
    assert counted == (5, len(steps), 5 + len(steps))


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_the_engines_with_its_logprobs(client, engine, stream) -> None:
    steps = steps_of(engine, CHAT, max_new_tokens=6, top_logprobs=2)
    asked = {
        "model": "tiny",
        "messages": CHAT,
        "max_completion_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }
    if stream:
        first, *chunks = client.chat.completions.create(**asked, stream=True)
        assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
        choices = [chunk.choices[0] for chunk in chunks]
        text = "".join(choice.delta.content or "" for choice in choices)
        entries = [entry for choice in choices for entry in choice.logprobs.content]
    else:
        (choice,) = client.chat.completions.create(**asked).choices
        text, entries, choices = choice.message.content, choice.logprobs.content, [choice]
    assert text == text_of(steps)
    assert choices[-1].finish_reason == "length"
    assert [entry.logprob for entry in entries] == [step.logprob for step in steps]
    assert [entry.token for entry in entries] == [engine.decode([step.token]) for step in steps]
    found = [[(top.token, top.logprob) for top in entry.top_logprobs] for entry in entries]
    assert found == [[(top.text, top.logprob) for top in step.top_logprobs] for step in steps]


def test_a_completion_tells_logprobs(client, engine) -> None:
    steps = steps_of(engine, PROMPT, max_new_tokens=4, top_logprobs=2)
    made = client.completions.create(model="tiny", prompt=engine.ids(PROMPT), max_tokens=4, logprobs=2)
    logprobs = made.choices[0].logprobs
    assert logprobs.token_logprobs == [step.logprob for step in steps]
    texts = [engine.decode([step.token]) for step in steps]
    assert (logprobs.tokens, logprobs.text_offset[0]) == (texts, 0)
    assert logprobs.top_logprobs == [{top.text: top.logprob for top in step.top_logprobs} for step in steps]


@pytest.mark.parametrize("many", [False, True])
def test_a_stop_text_ends_an_answer_before_it(client, engine, many) -> None:
    stop = text_of(steps_of(engine, PROMPT, max_new_tokens=12))[2:4]
    expected = steps_of(engine, PROMPT, max_new_tokens=12, stop=stop)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "stop": ["never", stop] if many else stop}
    (choice,) = client.completions.create(**asked).choices
    assert (choice.text, choice.finish_reason) == (text_of(expected), "stop")
    assert stop not in "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
    )


def test_an_answer_ends_where_the_cache_does(client, engine) -> None:
    made = client.chat.completions.create(model="tiny", messages=CHAT)
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].message.content == text_of(steps_of(engine, CHAT, max_new_tokens=99))


def test_the_model_is_named(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "stillgraph"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; ask for 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt=PROMPT)
    assert caught.value.code == "model_not_found"


TEXT, TALK = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}
BAD = {
    "no JSON": (TEXT, b"{", 400, "not JSON"),
    "no text": (TEXT, b"\xff\xfe", 400, "not JSON"),
    "deep": (TEXT, b"[" * 100_000, 400, "not JSON"),
    "a list": (TEXT, [], 400, "the body is"),
    "nothing": (TEXT, {}, 400, "model is missing"),
    "unknown": (TEXT, BASE | {"wings": 2}, 400, "wings is not known here"),
    "a number as text": (TEXT, BASE | {"max_tokens": "5"}, 400, "max_tokens is '5'"),
    "n": (TEXT, BASE | {"n": 2}, 400, "n is 2"),
    "two prompts": (TEXT, BASE | {"prompt": ["a", "b"]}, 400, "at most 1 item"),
    "an empty prompt": (TEXT, BASE | {"prompt": []}, 400, "the prompt is empty"),
    "no such id": (TEXT, BASE | {"prompt": [999]}, 400, "outside the vocabulary"),
    "a long prompt": (TEXT, BASE | {"prompt": "a" * 50}, 400, "the cache takes 40"),
    "half a character": (TEXT, BASE | {"prompt": "\ud800"}, 400, "not JSON"),
    "top_p": (TEXT, BASE | {"top_p": 2.0}, 400, "top_p is 2.0"),
    "stops": (TEXT, BASE | {"stop": ["a"] * 17}, 400, "at most 16"),
    "penalty": (TEXT, BASE | {"presence_penalty": 1.0}, 400, "presence_penalty is 1.0"),
    "tools": (TALK, {"model": "tiny", "messages": CHAT, "tools": [{}]}, 400, "tools is"),
    "no messages": (TALK, {"model": "tiny", "messages": []}, 400, "messages is []"),
    "a file": (
        TALK,
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}],
        },
        400,
        "messages.0.content",
    ),
    "a picture for the blind": (
        TALK,
        {
            "model": "tiny",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                }
            ],
        },
        400,
        "takes text alone",
    ),
    "too large": (TEXT, b" " * ((1 << 20) + 1), 413, "over 1048576 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_told_in_one_sentence(served: Served, name) -> None:
    path, body, status, words = BAD[name]
    found, answer, _ = served.post(path, body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert served.post(TEXT, BASE)[0] == 200


def test_a_page_from_elsewhere_gets_no_answer(served: Served) -> None:
    assert served.post(TEXT, BASE, {"content-type": "text/plain"})[0] == 415
    assert served.get("/v1/models", Host="elsewhere.example")[0] == 400
    status, _, headers = served.get("/v1/models")
    assert status == 200
    assert "access-control-allow-origin" not in headers


def test_other_paths_and_methods_are_told(served: Served) -> None:
    assert served.get("/v1/nothing")[0] == 404
    assert json.loads(served.get(TEXT)[1])["error"]["type"] == "invalid_request_error"
    assert served.get(TEXT)[0] == 405


def test_a_picture_comes_in_its_url(tiny_bundle) -> None:
    image = pytest.importorskip("PIL.Image", reason="a picture")
    bundle: Path = tiny_bundle(family="llava")
    buffer = io.BytesIO()
    image.effect_noise((12, 12), 90).convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    parts: list[Any] = [{"type": "image", "image": buffer.getvalue()}, {"type": "text", "text": "?"}]
    engine = load(bundle, threads=1)
    expected = steps_of(engine, [{"role": "user", "content": parts}], max_new_tokens=5)

    def asked(url: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}}, parts[1]]
        return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 5, **IDS}

    with serving(load(bundle, threads=1)) as served:
        status, answer, _ = served.post(TALK, asked(f"data:image/png;base64,{data}"))
        assert status == 200
        assert answer["choices"][0]["token_ids"] == [step.token for step in expected]
        for url in ("file:///etc/passwd", "https://example.org/a.png", "data:image/png;base64,?", "data:,a"):
            status, answer, _ = served.post(TALK, asked(url))
            assert (status, "read image" in answer["error"]["message"]) == (400, True)
