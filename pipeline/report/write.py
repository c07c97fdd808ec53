"""Writes a report's files, each at once or not at all: report.json, PNGs, report.html."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from pipeline.errors import ConfigError, StoreError
from pipeline.report.charts.png import pictures
from pipeline.report.data.report import Report
from pipeline.report.html.page import render_page

__all__ = ["read_report", "write_report"]

_log = logging.getLogger(__name__)


def write_report(report: Report, directory: str | Path) -> Path:
    """Write `report.json`, the PNGs for which there is data, and `report.html`.

    `loss.png`, `kl.png` and `cross_entropy.png` show the curves, `sweep.png` the runs of a sweep.

    The page comes last: who sees it finds the rest beside it.

    Args:
        report: what to show.
        directory: a local folder; created where it is missing.

    Returns:
        The path of the page.

    Raises:
        StoreError: the folder cannot be written.
    """
    folder = Path(directory)
    files = {"report.json": _json_text(report), **pictures(report)}
    files["report.html"] = render_page(report).encode("utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _replace(folder / name, data)
    except OSError as error:
        raise StoreError(
            f"{folder}: {error.strerror or error}",
            expected="a local folder that can be written",
            do="choose another folder, or free disk space",
        ) from error
    page = folder / "report.html"
    _log.info("report=%s bytes=%d", page, len(files["report.html"]))
    return page


def read_report(path: str | Path) -> Report:
    """Read a `report.json`, as to render it again.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds something else than a report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", expected="a report.json") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", expected="a report.json") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}", expected="a report.json")
    return Report.from_json(data)


def _json_text(report: Report) -> bytes:
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate has no UTF-8; its backslash escape is JSON for the very same text.
    return text.encode("utf-8", "backslashreplace")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
