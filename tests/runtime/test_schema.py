"""The published JSON Schema is that of the manifest's code."""

from __future__ import annotations

from pathlib import Path

from stillgraph import manifest


def test_the_published_schema_is_up_to_date() -> None:
    published = Path(manifest.__file__).with_name("manifest.schema.json")
    said = "run 'make schema'"
    assert published.read_text(encoding="utf-8") == manifest.json_schema(), said
