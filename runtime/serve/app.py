"""The application: the page and the API, for browsers of this machine's own pages alone."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stillgraph.engine import Engine
from stillgraph.pool import Pool
from stillgraph.serve.api import Api
from stillgraph.serve.page_routes import Site
from stillgraph.serve.refusals import no_such_page

MOST_BYTES = 16 << 20  # a picture of a phone, as base64


def application(
    pool: Pool,
    engine: Engine,
    name: str,
    hosts: list[str] | None = None,
    most_bytes: int = MOST_BYTES,
) -> Starlette:
    """The API over a pool, and the page of its bundle.

    engine: any of the pool's; name: of the model in the API; hosts: names by which a browser may have found
    this server, None for any: a page of another name that leads here could else read the answers.
    """
    routes = [*Api(pool, engine, name, most_bytes).routes, *Site(engine.bundle, engine.manifest).routes]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"])],
        exception_handlers={HTTPException: no_such_page, Exception: no_such_page},
    )
