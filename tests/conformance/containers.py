"""Rows written into files of every kind that the pipeline reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.conformance.chats import Chat

__all__ = ["CONTAINERS", "groups", "write"]

Rows = Sequence[dict[str, Any]]


def _line(row: dict[str, Any]) -> str:
    """Return a row as JSON, with its letters as they are where UTF-8 can hold them."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def _lines(rows: Rows) -> bytes:
    return "".join(_line(row) + "\n" for row in rows).encode()


def _jsonl(rows: Rows, folder: Path) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _json(rows: Rows, folder: Path) -> Path:
    path = folder / "chats.json"
    path.write_bytes(("[\n" + ",\n".join(map(_line, rows)) + "\n]\n").encode())
    return path


def _gz(rows: Rows, folder: Path) -> Path:
    path = folder / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(_lines(rows)))
    return path


def _zst(rows: Rows, folder: Path) -> Path:
    import zstandard

    path = folder / "chats.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(_lines(rows)))
    return path


def _filled(rows: Rows) -> list[dict[str, Any]]:
    """Return the rows with all columns in each, as a table has them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _parquet(rows: Rows, folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "chats.parquet"
    pq.write_table(pa.Table.from_pylist(_filled(rows)), path)
    return path


def _saved(rows: Rows, folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    path = folder / "saved"
    datasets.Dataset.from_list(_filled(rows)).save_to_disk(str(path))
    return path


def _csv(rows: Rows, folder: Path) -> Path:
    """Write lists as JSON text, and nothing for null."""
    filled = _filled(rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(filled[0]))
    writer.writeheader()
    for row in filled:
        cells = {
            name: json.dumps(value) if isinstance(value, (list, dict)) else value
            for name, value in row.items()
        }
        writer.writerow(cells)
    path = folder / "chats.csv"
    path.write_bytes(text.getvalue().encode())
    return path


CONTAINERS: dict[str, Callable[[Rows, Path], Path]] = {
    "jsonl": _jsonl,
    "json": _json,
    "jsonl.gz": _gz,
    "jsonl.zst": _zst,
    "csv": _csv,
    "parquet": _parquet,
    "save_to_disk": _saved,
}
_TYPED = ("parquet", "save_to_disk")


def write(rows: Rows, container: str, folder: Path) -> Path:
    """Write the rows and return what `dataset_name` has to be."""
    folder.mkdir(parents=True, exist_ok=True)
    return CONTAINERS[container](rows, folder)


def groups(chats: Sequence[Chat], container: str) -> list[list[Chat]]:
    """Return the chats that the container can hold, those that one file can hold together."""
    files: dict[tuple[str, str], list[Chat]] = {}
    for chat in chats:
        if container in _TYPED and not chat.arrow:
            continue
        # In CSV a prompt that is a list could be text that looks like one.
        if container == "csv" and "lists" in chat.arrow:
            continue
        schema = chat.arrow if container in _TYPED else ""
        files.setdefault((chat.format, schema), []).append(chat)
    return list(files.values())
