"""That a lane is of the class it is named after: one that silently ran natively would prove nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cpus import probe, products, sums
from tests.cpus.lanes import LANE, LANES

pytestmark = pytest.mark.kernels
NAME = os.environ.get(LANE)


@pytest.mark.skipif(NAME is None, reason=f"{LANE} names no class of CPU: this runs natively")
def test_the_lane_has_what_its_class_has(tmp_path: Path) -> None:
    """Its instruction sets, and what becomes of codes that are too large for kernels without VNNI."""
    lane = LANES[NAME or ""]
    assert lane.is_not(probe.features()) is None
    products.build(products.full_range(), tmp_path)
    assert (sums.difference(tmp_path) is not None) == lane.saturates
    assert sums.difference(tmp_path, sums.PRECISE) is None
