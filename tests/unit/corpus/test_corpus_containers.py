"""Every container gives the same conversations; what JSON cannot hold is named."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.sources.rows import BadRow
from tests.unit.corpus.interpreted import PACKERS, interpreted


def _call(name: str, call_id: str | None = None, **arguments: Any) -> dict[str, Any]:
    identity = {"id": call_id} if call_id else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"properties": properties}},
    }


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Wie spät ist es? \U0001f600"},
            {"role": "assistant", "tool_calls": [_call("clock", "c1", zone="CET")]},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Noon.", "reasoning_content": "CET, so 12."},
        ],
        "tools": [_tool("clock", zone={"type": "string"})],
        "system": "Be exact.",
    },
    {
        "messages": [
            {"role": "developer", "content": "Short."},
            {"role": "user", "content": "Set two alarms."},
            {"role": "assistant", "content": "", "tool_calls": [_call("alarm", hour=6, loud=True)]},
            {"role": "assistant", "content": "Done.", "weight": 0},
        ],
        "tools": [_tool("alarm", hour={"type": "integer", "enum": [6, 7]}), _tool("clock")],
        "system": None,
    },
    {
        "messages": [
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Yes.", "train": True},
        ],
        "tools": None,
        "system": "",
    },
]


def _save(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def _save_as_json_columns(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets

    features = datasets.Features(
        messages=datasets.List(datasets.Json()),
        tools=datasets.List(datasets.Json()),
        system=datasets.Value("string"),
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(path))


def _write(rows: list[dict[str, Any]], path: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    texts = [{k: v if k == "system" else json.dumps(v) for k, v in row.items()} for row in rows]
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(lines, encoding="utf-8")
        case "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "texts.parquet":
            pq.write_table(pa.Table.from_pylist(texts), path)
        case "dictionary.parquet":
            table = pa.Table.from_pylist(texts)
            pq.write_table(table.set_column(0, "messages", table[0].dictionary_encode()), path)
        case "csv" | "tsv":
            with path.open("w", encoding="utf-8", newline="") as stream:
                dialect = "excel" if path.suffix == ".csv" else "excel-tab"
                writer = csv.DictWriter(stream, list(rows[0]), dialect=dialect)
                writer.writeheader()
                writer.writerows(texts)
        case "saved":
            _save(rows, path)
        case "json.saved":
            _save_as_json_columns(rows, path)
        case _:
            path.write_bytes(PACKERS[path.suffix[1:]](lines.encode()))
    return path


@pytest.mark.parametrize(
    "container",
    [
        *("json", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "csv", "tsv"),
        *("parquet", "texts.parquet", "dictionary.parquet", "saved", "json.saved"),
    ],
)
def test_every_container_gives_the_same_conversations(container: str, tmp_path: Path) -> None:
    wanted = interpreted(_write(ROWS, tmp_path / "a.jsonl"))
    assert [type(item) for item in wanted] == [Conversation] * 3
    found = interpreted(_write(ROWS, tmp_path / f"b.{container}"))
    for one, other in zip(found, wanted, strict=True):
        assert one == other


def test_what_the_rows_above_hold(tmp_path: Path) -> None:
    first, second, third = interpreted(_write(ROWS, tmp_path / "a.parquet"))
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert isinstance(third, Conversation)
    assert first.messages == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Wie spät ist es? \U0001f600"},
        {"role": "assistant", "content": "", "tool_calls": [_call("clock", "c1", zone="CET")]},
        {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "CET, so 12."},
    ]
    assert first.tools == ROWS[0]["tools"]
    assert second.tools == ROWS[1]["tools"]
    assert (second.developer, second.unsupervised) == (frozenset([0]), frozenset([3]))
    assert second.messages[2]["tool_calls"] == [_call("alarm", hour=6, loud=True)]
    assert third == Conversation(
        [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    )


@pytest.mark.parametrize("container", ["jsonl", "texts.parquet", "json.saved"])
def test_a_null_that_was_written_stays_below_the_message(container: str, tmp_path: Path) -> None:
    tool = _tool("clock", zone={"type": "string", "default": None})
    messages = [
        {"role": "user", "content": "q", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [_call("clock", zone=None)]},
    ]
    rows = [{"messages": messages, "tools": [tool], "system": None}]
    (found,) = interpreted(_write(rows, tmp_path / f"a.{container}"))
    assert isinstance(found, Conversation)
    assert found.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [_call("clock", zone=None)]},
    ]
    assert found.tools == [tool]


def test_a_map_of_arrow_is_an_object_with_its_nulls(tmp_path: Path) -> None:
    arguments = pa.map_(pa.string(), pa.string())
    call = pa.struct([("name", pa.string()), ("arguments", arguments)])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))]
    )

    def row(pairs: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
        calls = [{"name": "f", "arguments": pairs}]
        return [{"role": "assistant", "content": "x", "tool_calls": calls}]

    rows = [row([("a", None), ("b", "1")]), row([("a", "1"), ("a", "2")])]
    pq.write_table(
        pa.table({"messages": pa.array(rows, pa.list_(message))}), tmp_path / "a.parquet"
    )
    good, bad = interpreted(tmp_path / "a.parquet")
    assert isinstance(good, Conversation)
    assert good.messages[0]["tool_calls"] == [_call("f", a=None, b="1")]
    assert isinstance(bad, BadRow)
    assert "a map with the key 'a' twice" in str(bad)


@pytest.mark.parametrize("saved", [True, False])
def test_a_sequence_of_objects_is_a_list_of_messages(saved: bool, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        conversations=datasets.Sequence(
            {"from": datasets.Value("string"), "value": datasets.Value("string")}
        )
    )
    chat = {"from": ["human", "gpt"], "value": ["Hi?", "Yes."]}
    table = datasets.Dataset.from_dict(
        {"conversations": [{"from": [], "value": []}, chat]}, features=features
    )
    path = tmp_path / ("a" if saved else "a.parquet")
    table.save_to_disk(str(path)) if saved else table.to_parquet(str(path))
    empty, found = interpreted(path)
    assert empty == Conversation([])
    assert isinstance(found, Conversation)
    assert found.messages == [
        {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."},
    ]  # fmt: skip


def test_a_format_saved_with_a_dataset_does_not_matter(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    table.set_format("numpy", columns=["n"])
    table.save_to_disk(str(tmp_path / "saved"))
    assert interpreted(tmp_path / "saved") == [Document("a"), Document("b")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "a date or time"),
        (decimal.Decimal("1.5"), "holds Decimal"),
        (b"\x00", "holds bytes"),
        (float("nan"), "holds nan"),
        (float("inf"), "holds inf"),
    ],
)
def test_what_json_cannot_hold_is_named(value: Any, message: str, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [_call("f", when=value)]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "a.parquet")
    (bad,) = interpreted(tmp_path / "a.parquet")
    assert isinstance(bad, BadRow)
    assert bad.kind == "not JSON data"
    assert "a.parquet, row 1, message 2, tool_calls[0].function.arguments.when: " in str(bad)
    assert message in str(bad)


def test_nan_in_json_lines_is_named_where_it_is_used(tmp_path: Path) -> None:
    call = '{"name": "f", "arguments": {"a": [1, NaN]}}'
    chat = '[{"role": "assistant", "content": "", "tool_calls": [' + call + "]}]"
    (tmp_path / "a.jsonl").write_text(
        '{"score": NaN, "messages": [{"role": "user", "content": "x"}]}\n'
        f'{{"messages": {chat}}}\n'
    )
    good, bad = interpreted(tmp_path / "a.jsonl")
    assert isinstance(good, Conversation)
    assert isinstance(bad, BadRow)
    assert "message 1, tool_calls[0].function.arguments.a[1]: holds nan" in str(bad)


def test_the_time_of_a_message_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    rows = [{"messages": [{"role": "user", "content": "q", "sent": sent}]}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert (
        interpreted(tmp_path / "a.parquet")
        == [Conversation([{"role": "user", "content": "q"}])] * 2
    )
    assert "2 rows: 'sent' of a message is a date or time" in caplog.text


def test_text_of_parquet_that_is_no_unicode_fails_its_row_only(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xffd", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    first, bad, last = interpreted(tmp_path / "a.parquet")
    assert (first, last) == (Document("good"), Document("fine"))
    assert isinstance(bad, BadRow)
    assert bad.kind == "not Unicode"
    assert str(bad).startswith("a.parquet, row 2: the column 'text' holds text that is not UTF-8")
