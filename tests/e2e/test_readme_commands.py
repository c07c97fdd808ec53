"""README's commands, executed as written: the default run, its table, and the reading examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def _blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language; "" is a block without one."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in README.splitlines():
        if line.startswith("```"):
            if not inside:
                blocks.append((line.removeprefix("```"), []))
            inside = not inside
        elif inside:
            blocks[-1][1].append(line)
    return ["\n".join(lines) for name, lines in blocks if name == language]


def _shell(command: str) -> str:
    # A make that runs these tests hands its own variables (ARGS) down to a make inside.
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    result = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def default_run() -> str:
    """What `make distill` prints; the first of README's two commands."""
    first, second = next(b for b in _blocks("") if b.startswith("make distill")).split("\n")[:2]
    assert (first, second) == ("make distill", "make test")
    return _shell(first)


def test_default_run_beats_its_control_clearly(default_run: str) -> None:
    report = json.loads((ROOT / "runs/default/report/report.json").read_text(encoding="utf-8"))
    rows = {row["kind"]: row["metrics"] for row in report["rows"]}
    assert rows["distilled"]["kl"]["value"] < rows["before"]["kl"]["value"]
    gaps = {d["metric"]: d for d in report["differences"] if "control" in d["b"]}
    for metric, errors in (("kl", 5), ("cross_entropy", 2)):
        gap = gaps[metric]
        assert gap["value"] < -errors * gap["standard_error"], metric
    held_out = [c for c in report["curves"] if c["name"].startswith("held-out")]
    assert len(held_out) == 6, "KL, cross-entropy and acceptance, of both"
    assert all(len(curve["points"]) > 3 and curve["over"] == "tokens" for curve in held_out)
    for row in report["rows"]:
        shown = re.search(rf"^{re.escape(row['name'])} +(\d+\.\d+)", default_run, re.MULTILINE)
        assert shown, f"no line for {row['name']!r}"
        assert float(shown[1]) == pytest.approx(row["metrics"]["kl"]["value"], abs=6e-3)


def test_second_call_redoes_nothing(default_run: str) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in (ROOT / "runs/default/cache/data").rglob("*.parquet")
    }
    again = _shell("make distill")
    assert "nothing to install" in again
    assert "cache-teacher:" not in again
    assert "train-student:" not in again
    after = {p: p.stat().st_mtime_ns for p in (ROOT / "runs/default/cache/data").rglob("*.parquet")}
    assert after == before


def test_readme_table_has_the_shape_of_the_real_one(default_run: str) -> None:
    shown = README.split("<!-- table: make distill -->")[1].split("<!-- end -->")[0]
    for line in shown.strip().splitlines():
        name = line.split("  ")[0].strip()
        if re.search(r"\d ± ", line):
            assert name in default_run, f"README shows a row {name!r} that the run does not print"


def test_cache_commands(default_run: str) -> None:
    commands = [
        line
        for block in _blocks("")
        for line in block.splitlines()
        if line.startswith("python -m pipeline.cache")
    ]
    assert len(commands) == 3
    for command in commands:
        _shell(command.replace("python ", ".venv/bin/python ", 1))


def test_dataset_and_sql_snippets(default_run: str) -> None:
    import duckdb

    python = next(block for block in _blocks("python") if "load_dataset" in block)
    _shell(f".venv/bin/python - <<'END'\n{python}\nEND")
    query = _blocks("sql")[0].split("--")[0].strip().rstrip(";")
    value = duckdb.sql(query.replace("'runs", f"'{ROOT}/runs")).fetchall()[0][0]
    assert 0 < value < 1
