"""One bad row is named and the others are read; a damaged or cut off file is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.corpus.sources.readers import READABLE, data_suffix
from pipeline.corpus.sources.rows import BadRow
from pipeline.errors import CorpusError
from tests.unit.corpus.interpreted import PACKERS, interpreted, raw_rows


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": \n{"text": "b"}',
            "a.jsonl, line 3: Expecting value",
        ),
        ("a.jsonl", b'{"text": "a"}\n[1]\n{"text": "b"}', "a.jsonl, line 2: holds list"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"x": "\xff"}\n{"text": "b"}',
            "a.jsonl, line 2: is not UTF-8",
        ),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 99999 + b'\n{"text": "b"}', "a.jsonl, line 2: "),
        (
            "a.jsonl",
            b'{"text": "a"}\n' + b"1" * 9999 + b'\n{"text": "b"}',
            "a.jsonl, line 2: Exceeds",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"txt": "x"}\n{"text": "b"}',
            "line 2: the column 'text' is mis",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 1}\n{"text": "b"}',
            "line 2: the column 'text' holds i",
        ),
        ("a.json", b'[{"text": "a"}, 5, {"text": "b"}]', "a.json, item 2: holds int"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]',
            "item 2, the text: character 1",
        ),
        ("a.csv", b"id,text\n1,a\n2\n3,b\n", "a.csv, record 2: has another number of fields"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n3,b\n", "a.csv, record 2: has another number of fields"),
        ("a.csv", b"id,text\n1,a\n2,\xff\n3,b\n", "a.csv, record 2: is not UTF-8 text"),
        ("a.tsv", b"id\ttext\n1\ta\n2\n3\tb\n", "a.tsv, record 2: has another number of fields"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(
    name: str, body: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(body)
    first, bad, last = interpreted(tmp_path / name)
    assert (first, last) == (Document("a"), Document("b"))
    assert isinstance(bad, BadRow)
    assert message in str(bad)
    # Keys count the bad rows, too; those of lines are the bytes where they begin.
    keys: list[int] = list(range(3))
    if name.endswith(".jsonl"):
        lines = body.split(b"\n")
        starts = [sum(len(line) + 1 for line in lines[:n]) for n in range(len(lines))]
        keys = [start for start, line in zip(starts, lines, strict=True) if line]
    assert [row.key for row in raw_rows(tmp_path / name)] == [f"{name}:{key}" for key in keys]


def test_a_text_file_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    for name, body in (("a.txt", b"one"), ("b.txt", b"\xe9"), ("c.txt", b"three")):
        (tmp_path / name).write_bytes(body)
    first, bad, last = interpreted(tmp_path)
    assert (first, last) == (Document("one"), Document("three"))
    assert isinstance(bad, BadRow)
    assert bad.kind == "not UTF-8"


def test_bad_rows_before_a_good_one_do_not_hide_the_format(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "q"}]})
    (tmp_path / "a.jsonl").write_text("{\n[]\n" + good)
    assert [isinstance(item, BadRow) for item in interpreted(tmp_path / "a.jsonl")] == [
        True, True, False,
    ]  # fmt: skip
    (tmp_path / "b.jsonl").write_text("{\n[]\n")
    with pytest.raises(CorpusError, match=r"b.jsonl, line 1: Expecting property") as caught:
        interpreted(tmp_path / "b.jsonl")
    assert not isinstance(caught.value, BadRow)


@pytest.mark.parametrize("kind", list(PACKERS))
def test_all_members_of_a_packed_file_are_read(kind: str, tmp_path: Path) -> None:
    pack = PACKERS[kind]
    texts = [f"number {n}" for n in range(5000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    body = pack(b"".join(lines[:2000])) + pack(b"".join(lines[2000:2001])) + pack(b"")
    whole = body + pack(b"".join(lines[2001:]))
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(whole)
    assert interpreted(file) == [Document(text) for text in texts]
    for damaged in (whole[:-9], whole[: len(body) + 9], body + b"damaged " * 9):
        file.write_bytes(damaged)
        with pytest.raises(CorpusError, match=rf"{file.name}: cannot be unpacked.*copy the file"):
            interpreted(file)


@pytest.mark.parametrize("kind", list(PACKERS))
def test_a_packed_json_file_of_any_shape(kind: str, tmp_path: Path) -> None:
    for body in ('{"rows": [{"text": "a"}]}', '[{"text": "a"}]', '{"text": "a"}'):
        (tmp_path / f"a.json.{kind}").write_bytes(PACKERS[kind](body.encode()))
        assert interpreted(tmp_path / f"a.json.{kind}") == [Document("a")]


def test_which_names_are_data() -> None:
    assert data_suffix("x/A.JSONL.ZST") == ".jsonl"
    assert data_suffix("a.tsv.xz") == ".tsv"
    assert data_suffix("a.ndjson") == ".ndjson"
    for name in ("a.parquet.zst", "a.jsonl.gz.zst", "a.zst", "a.zip", "README.md"):
        assert data_suffix(name) is None
    for name in (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".gz", ".zst"):
        assert name in READABLE


def test_a_long_field_of_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"' + "x" * 300_000 + '"\n')
    assert interpreted(tmp_path / "a.csv") == [Document("x" * 300_000)]


@pytest.mark.parametrize(
    ("name", "body"), [("a.csv", b"text,text\n1,2\n"), ("a.tsv", b"text\ttext\n1\t2\n")]
)
def test_a_column_that_is_there_twice_is_refused(name: str, body: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(CorpusError, match="has the column 'text' twice"):
        interpreted(tmp_path / name)


def test_a_conversation_that_is_text_but_not_json_is_named(tmp_path: Path) -> None:
    good = json.dumps([{"role": "user", "content": "q"}])
    rows = [{"messages": text} for text in (good, "[{", "", good)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, bad, empty, last = interpreted(tmp_path / "a.jsonl")
    assert first == last == Conversation([{"role": "user", "content": "q"}])
    assert empty == Conversation([])
    assert isinstance(bad, BadRow)
    assert bad.kind == "not JSON"
    assert "line 2: the conversation is not JSON" in str(bad)


def test_a_text_that_is_json_stays_a_text(tmp_path: Path) -> None:
    text = json.dumps([{"role": "user", "content": "q"}])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert interpreted(tmp_path / "a.jsonl") == [Document(text)]


_CALLS = '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}]}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"messages": [], "messages": [{"role": "user", "content": "q"}]}', "messages"),
        ('{"messages": [{"role": "user", "content": "q", "content": "r"}]}', "content"),
        ('{"messages": [{"role": "user", "content": [{"text": "q", "text": "r"}]}]}', "text"),
        (_CALLS.replace("CALL", '{"name": "f", "name": "g"}'), "name"),
        (_CALLS.replace("CALL", r'{"name": "f", "arguments": "{\"a\": 1, \"a\": 2}"}'), "a"),
        (_CALLS.replace("CALL", '{"name": "f", "arguments": {"b": {"a": 1, "a": 2}}}'), "a"),
        ('{"tools": [{"name": "f", "name": "g"}], "messages": []}', "name"),
        (r'{"tools": "[{\"name\": 1, \"name\": 2}]", "messages": []}', "name"),
    ],
)
def test_an_object_with_a_key_twice_loses_neither_in_silence(
    row: str, key: str, name: str, tmp_path: Path
) -> None:
    good = '{"messages": [{"role": "user", "content": "q"}], "meta": {"x": 1, "x": 2}}'
    path = tmp_path / name
    lines = "\n".join([good, row]) if name == "a.jsonl" else f"[{good},\n{row}]"
    path.write_text(lines, encoding="utf-8")
    first, second = interpreted(path)
    assert isinstance(first, Conversation)
    assert isinstance(second, BadRow)
    assert f"an object with the key '{key}' twice" in str(second)


@pytest.mark.parametrize(
    "first", ['["x"]', '"oops"', "[null]", "5", '[{"text": "q"}]', '{"a": 1}', "null"]
)
def test_a_bad_first_row_does_not_hide_the_format(first: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [first, '[{"role": "user", "content": "q"}]']
    path.write_text("\n".join(f'{{"messages": {row}}}' for row in rows), encoding="utf-8")
    assert isinstance(interpreted(path)[1], Conversation)
    path.write_text('{"text": 5}\n{"text": "b"}', encoding="utf-8")
    assert interpreted(path)[1] == Document("b")
