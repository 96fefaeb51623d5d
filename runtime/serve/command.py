"""`stillgraph serve`."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stillgraph.cpu import available_cores
from stillgraph.errors import StillgraphError
from stillgraph.files import check_files
from stillgraph.manifest import read

if TYPE_CHECKING:
    import uvicorn

    from stillgraph.pool import Pool

STAGE = "serve"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    bundle: Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this is open to others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the API. Default: the folder's.")
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; the next is answered 429.")
    ] = 256,
    engines: Annotated[
        int, typer.Option(min=1, help="Requests computed at once, over one weights file.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of an engine. Default: its share of this process's cores.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Of a request, in MB.")] = 16,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Serve a bundle: a page that runs it in the browser, and an API as OpenAI's under /v1.

    The address goes to stdout. Ctrl-C ends the requests that run after their step, and the server.
    """
    check_files(bundle, read(bundle))
    uvicorn_server = _server_class()
    with (
        _listen(host, port) as listening,
        Console(stderr=True, quiet=quiet).status(f"loading {bundle}") as status,
    ):
        pool, app = _application(bundle, host, name, queue, engines, threads, max_body)
        with pool:
            status.stop()
            address, found = listening.getsockname()[:2]
            print(f"http://{_spelled(address)}:{found}", flush=True)
            if not quiet:
                _say(host)
            _run(uvicorn_server(pool, app), listening)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises StillgraphError, which names the port that is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # where it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        problem = f"port {port} of {host} cannot be had ({error.strerror or error})"
        raise StillgraphError(
            STAGE, problem, "choose another with --port, or any that is free with --port 0"
        ) from error
    return listening


def _spelled(address: str) -> str:
    """As URLs and a browser's Host header have it: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def _application(
    bundle: Path,
    host: str,
    name: str | None,
    queue: int,
    engines: int,
    threads: int | None,
    max_body: int,
) -> tuple[Pool, Any]:
    from stillgraph.loading import load
    from stillgraph.pool import Pool
    from stillgraph.serve.app import application

    # A thread without a core of its own waits for one in every product.
    threads = threads or max(1, available_cores() // engines)
    loaded = [load(bundle, threads=threads) for _ in range(engines)]
    pool, hosts = Pool(loaded, queue), [*map(_spelled, LOOPBACK)] if host in LOOPBACK else None
    return pool, application(pool, loaded[0], name or bundle.resolve().name, hosts, max_body << 20)


def _server_class() -> Any:
    """uvicorn's server, which ends the pool's requests before it waits for its connections to end."""
    import asyncio  # here, since every command imports this module

    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        problem = f"{error.name} is not installed"
        raise StillgraphError(STAGE, problem, "pip install 'stillgraph[serve]'") from error

    class Server(uvicorn.Server):
        def __init__(self, pool: Pool, app: Any) -> None:
            super().__init__(
                uvicorn.Config(app, http="h11", ws="none", log_level="warning", timeout_graceful_shutdown=5)
            )
            self._pool = pool

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await asyncio.to_thread(self._pool.close)
            await super().shutdown(sockets)

    return Server


def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    # uvicorn ends well at Ctrl-C, and then passes it on to whoever handled it before, if anyone did.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    print("stopped", file=sys.stderr)


def _say(host: str) -> None:
    open_to = "" if host in LOOPBACK else "; whoever reaches this address may use it"
    print(f"the page is at /, the API under /v1{open_to}; Ctrl-C stops", file=sys.stderr)
