"""A server of the tiny bundle, and an engine to compare its answers with."""

from __future__ import annotations

import pytest

from stillgraph.loading import load
from tests.runtime.serve.serving import serving


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    """What the answers are compared with: it is not the one that is served."""
    return load(tiny_bundle(), threads=1)


@pytest.fixture(scope="module")
def served(tiny_bundle):
    with serving(load(tiny_bundle(), threads=1)) as server:
        yield server
