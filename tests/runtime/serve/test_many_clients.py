"""Many clients at once, clients that vanish, a full queue, and how a server ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import openai
import pytest

from stillgraph.cli import main
from stillgraph.loading import load
from stillgraph.serve.command import _application
from tests.runtime.serve.serving import JSON, PATIENCE, Served, serving, until
from tests.runtime.test_one_at_a_time import Gate

PROMPT = "Once"
TEXT = "/v1/completions"
IDS = {"return_token_ids": True}
BASE: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}


def ask_many(served: Served, count: int) -> list[Any]:
    """The token ids of each answer, or what was raised."""

    async def main() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(index: int) -> list[int]:
                prompt = f"p{index}"
                asked = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "extra_body": IDS}
                if index % 2:
                    return (await client.completions.create(**asked)).choices[0].token_ids
                chunks = await client.completions.create(**asked, stream=True)
                return [token async for chunk in chunks for token in chunk.choices[0].token_ids]

            return await asyncio.gather(*map(one, range(count)), return_exceptions=True)

    return asyncio.run(main())


def test_two_hundred_at_once(served: Served, engine) -> None:
    expected = [[step.token for step in engine.stream(f"p{index}", max_new_tokens=3)] for index in range(200)]
    assert ask_many(served, 200) == expected


def test_a_full_queue_is_told_and_the_others_are_answered(tiny_bundle, engine) -> None:
    with serving(load(tiny_bundle(), threads=1), limit=4) as served:
        gate = Gate(served.engine.graphs._decode)
        first = served.begin(TEXT, BASE)
        assert gate.entered.wait(PATIENCE)
        waiting = [served.begin(TEXT, BASE) for _ in range(4)]
        until(lambda: len(served.pool._waiting) == 4)
        status, answer, headers = served.post(TEXT, BASE)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        waiting.pop().close()  # one that goes makes room
        until(lambda: sum(request.canceled.is_set() for request in served.pool._waiting) == 1)
        waiting.append(served.begin(TEXT, BASE))
        until(lambda: len(served.pool._waiting) == 5)
        gate.opened.set()
        assert [connection.getresponse().status for connection in (first, *waiting)] == [200] * 5
        served.pool.close()
        status, answer, headers = served.post(TEXT, BASE)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "closed", "1")


def test_two_engines_compute_at_once_and_a_third_request_waits(tiny_bundle, engine) -> None:
    first, second = (load(tiny_bundle(), threads=1) for _ in range(2))
    with serving(first, more=(second,)) as served:
        gates = [Gate(each.graphs._decode) for each in (first, second)]
        asked = [served.begin(TEXT, BASE | IDS | {"prompt": f"p{index}"}) for index in range(3)]
        assert all(gate.entered.wait(PATIENCE) for gate in gates)
        until(lambda: len(served.pool._waiting) == 1)
        for gate in gates:
            gate.opened.set()
        for index, connection in enumerate(asked):
            answer = json.loads(connection.getresponse().read())
            expected = [step.token for step in engine.stream(f"p{index}", max_new_tokens=2)]
            assert answer["choices"][0]["token_ids"] == expected


def test_engines_share_the_cores(tiny_bundle, monkeypatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("stillgraph.serve.command.available_cores", lambda: 6)
    monkeypatch.setattr(
        "stillgraph.loading.load", lambda bundle, threads: given.append(threads) or load(bundle, threads=1)
    )
    for engines, threads in ((1, None), (4, None), (8, None), (2, 5)):
        pool, _ = _application(tiny_bundle(), "127.0.0.1", "tiny", 4, engines, threads, 1)
        pool.close()
    assert given == [6, *[1] * 4, *[1] * 8, *[5] * 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_the_engine(tiny_bundle, engine, stream) -> None:
    with serving(load(tiny_bundle(), threads=1)) as served:
        gate = Gate(served.engine.graphs._decode)
        connection = served.begin(TEXT, BASE | {"max_tokens": 30, "stream": stream})
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        assert gate.entered.wait(PATIENCE)
        (request,) = served.pool._computed.values()
        connection.sock.close() if connection.sock else connection.close()
        connection.close()
        until(request.canceled.is_set)
        gate.opened.set()
        until(lambda: not served.pool._computed)
        assert len(served.engine.graphs.cached[0]) == 5 + 1  # of 30 tokens, one was computed on
        assert served.post(TEXT, BASE)[0] == 200


def test_closing_ends_a_stream_with_an_error(tiny_bundle) -> None:
    with serving(load(tiny_bundle(), threads=1)) as served:
        gate = Gate(served.engine.graphs._decode)
        response = served.begin(TEXT, BASE | {"max_tokens": 30, "stream": True}).getresponse()
        assert gate.entered.wait(PATIENCE)
        closing = threading.Thread(target=served.pool.close)
        closing.start()
        until(lambda: served.pool._closed)
        gate.opened.set()
        said = response.read().decode().strip().split("\n\n")[-1]
        assert "the pool is closed" in json.loads(said.removeprefix("data: "))["error"]["message"]
        closing.join(PATIENCE)


def test_a_port_in_use_is_one_sentence(served: Served, tiny_bundle, capsys) -> None:
    assert main(["serve", str(tiny_bundle()), "--port", str(served.port)]) == 2
    said = capsys.readouterr().err.strip()
    assert f"port {served.port} of 127.0.0.1 cannot be had" in said
    assert "\n" not in said


def test_ctrl_c_ends_it_well(tiny_bundle) -> None:
    command = [
        sys.executable,
        "-m",
        "stillgraph.cli",
        "serve",
        str(tiny_bundle()),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition(":")[2])
    status = Served(port, None, None).get("/v1/models")[0]  # type: ignore[arg-type]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert (status, process.returncode) == (200, 0)
    assert said.strip().endswith("stopped")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("::1", 400),
        ("a", 400),
    ],
)
def test_a_loopback_address_answers_to_its_names_alone(tiny_bundle, host, status) -> None:
    """As a browser sends it, an IPv6 address in brackets; another name may be a page's from elsewhere."""
    pool, application = _application(tiny_bundle(), "::1", None, 1, 1, None, 1)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "root_path": ""}
    with pool:
        asyncio.run(application({**scope, "headers": [(b"host", host.encode())]}, receive, send))
    assert sent[0]["status"] == status


def test_a_body_that_does_not_end_holds_up_nobody(served: Served) -> None:
    slow = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    slow.putrequest("POST", TEXT)
    for name, value in {**JSON, "content-length": "1000"}.items():
        slow.putheader(name, value)
    slow.endheaders(b'{"model"')
    assert served.post(TEXT, BASE)[0] == 200
    slow.close()
    assert served.post(TEXT, BASE)[0] == 200


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_a_package_that_is_missing_is_one_sentence(tiny_bundle, package, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", str(tiny_bundle()), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert f"{package} is not installed; pip install 'stillgraph[serve]'." in said
