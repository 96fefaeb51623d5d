"""What CONTRIBUTING.md shows of a family is what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_worked_example_is_the_file_and_its_test() -> None:
    family, config = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert family == (ROOT / "export/families/qwen3.py").read_text(encoding="utf-8")
    assert config in (ROOT / "tests/decoders.py").read_text(encoding="utf-8")


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"`?((?:tests|export|patches)/[\w/]+(?:\.py|\.md)?)", TEXT)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
