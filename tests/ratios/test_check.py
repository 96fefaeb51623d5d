"""`make bench` warns of what grew and of what it did not measure."""

from tests.ratios.check import TOLERANCE, grown

KEPT = {"a": {"tpot_ratio": 1.0}, "b": {"tpot_ratio": 1.0}}


def test_what_grew_and_what_is_missing_are_named() -> None:
    assert grown(KEPT, {name: {"tpot_ratio": TOLERANCE} for name in KEPT}) == []
    assert grown(KEPT, {"a": {"tpot_ratio": TOLERANCE + 0.1}}) == [
        "a: tpot_ratio is 1.35 and was 1.00",
        "b was not measured",
    ]
