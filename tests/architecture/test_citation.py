"""CITATION.cff says what the package says, in the form of its schema (1.2.0)."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

from pipeline.program import VERSION

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"authors", "cff-version", "message", "title"}
KNOWN = REQUIRED | {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license",
    "license-url", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "type", "url", "version",
}  # fmt: skip


def test_the_citation_is_valid_and_agrees_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(citation) <= KNOWN
    assert set(citation) >= REQUIRED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"] == project["name"]
    assert citation["version"] == VERSION
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert all(isinstance(item, str) for item in citation["keywords"])
    assert all(set(author) == {"name"} for author in citation["authors"]), "entities, not persons"
