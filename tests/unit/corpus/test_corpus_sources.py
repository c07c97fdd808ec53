"""Files, folders, saved datasets and the hub: order, splits, and the error messages."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.settings import CorpusSettings
from pipeline.corpus.sources import json_items as json_items_module
from pipeline.corpus.sources.hub import StreamedSource
from pipeline.corpus.sources.json_items import NotAnArray, json_items
from pipeline.corpus.sources.registry import open_source
from pipeline.errors import CorpusError

Build = Callable[..., Any]

TEXTS = [f"what does number {i} do" for i in range(6)]


def _texts(corpus: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(s.input_ids, skip_special_tokens=True) for s in corpus.samples]


def _write(kind: str, folder: Path, texts: list[str], stem: str = "part") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text} for text in texts]
    match kind:
        case "jsonl":
            (folder / f"{stem}.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        case "jsonl.gz":
            body = "\n".join(map(json.dumps, rows)).encode()
            (folder / f"{stem}.jsonl.gz").write_bytes(gzip.compress(body))
        case "json":
            (folder / f"{stem}.json").write_text(json.dumps(rows))
        case "lines in json":
            (folder / f"{stem}.json").write_text("\n".join(map(json.dumps, rows)))
        case "csv":
            (folder / f"{stem}.csv").write_text("id,text\n" + "".join(f'1,"{t}"\n' for t in texts))
        case "txt":
            for number, text in enumerate(texts):
                (folder / f"{stem}{number}.txt").write_text(text)
        case "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": texts}), folder / f"{stem}.parquet")


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json", "lines in json", "csv", "txt", "parquet"]
)
def test_every_kind_of_file(kind: str, tmp_path: Path, build: Build, tokenizer: Any) -> None:
    _write(kind, tmp_path / "d", TEXTS)
    (tmp_path / "d" / "README.md").write_text("not data")
    (tmp_path / "d" / "_meta").mkdir()
    (tmp_path / "d" / "_meta" / "x.jsonl").write_text("not data")
    corpus = build(tmp_path / "d")
    assert _texts(corpus, tokenizer) == TEXTS
    assert [sample.source_index for sample in corpus.samples] == list(range(6))
    assert corpus.counts.rows == 6
    assert all(size > 0 for _, size in corpus.identity["content"]["files"])


def test_a_mapped_table_is_read_in_pieces_of_their_own_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from pipeline.corpus.sources import hub

    texts = [f"number {i}" for i in range(3000)]
    table = datasets.Dataset.from_dict({"text": texts})
    assert len(list(hub._mapped(table, 0, 3000))) == 1  # in memory: a copy would cost all of it
    table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    monkeypatch.setattr(hub, "_MAPPED_BYTES", 1)
    mapped = datasets.load_from_disk(str(tmp_path / "saved"))
    assert [len(piece) for piece in hub._mapped(mapped, 0, 3000)] == [1024, 1024, 952]
    source = hub.saved_source(tmp_path / "saved", "train")
    rows = [row for piece in source.pieces(1 << 13) for row in source.read(piece)]
    assert len(list(source.pieces(1 << 13))) > 3
    assert [row.data["text"] for row in rows] == texts
    assert [(row.key, row.place) for row in rows[::1500]] == [
        ("0", "saved, row 0"), ("1500", "saved, row 1500"),
    ]  # fmt: skip
    some = mapped.select(range(2900, 100, -1))  # through indices
    through = hub.TableSource("n", some, "x", {})
    found = [row.data["text"] for piece in through.pieces(9999) for row in through.read(piece)]
    assert found == texts[2900:100:-1]


@pytest.mark.parametrize("space", ["", "\n", " \r\n\t"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_json_array_is_read_item_by_item(
    space: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_items_module, "_CHUNK", chunk)
    items = [{"a": "x\n]},{" * 9, "b": [1, {"c": None}]}, 12, -1.5e3, "\u00e9", [], {}, True, 345]
    text = space + json.dumps(items, ensure_ascii=False, indent=len(space) or None) + space
    assert list(json_items(io.StringIO(text))) == items
    for cut in range(len(text.rstrip())):
        with pytest.raises((json.JSONDecodeError, NotAnArray)):
            list(json_items(io.StringIO(text[:cut])))
    assert list(json_items(io.StringIO(f"{space}[{space}]{space}"))) == []


@given(text=st.text('[]{},:" \n1té', max_size=14), chunk=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_what_is_an_array_is_jsons_own_word(text: str, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items_module, "_CHUNK", chunk)
        try:
            wanted = json.loads("[" + text)
        except json.JSONDecodeError:
            with pytest.raises(json.JSONDecodeError):
                list(json_items(io.StringIO("[" + text)))
        else:
            assert list(json_items(io.StringIO("[" + text))) == wanted


def test_reading_an_array_takes_one_item_of_memory() -> None:
    text = io.StringIO("[" + ",\n".join(['{"text": "' + "x" * 500 + '"}'] * 40_000) + "]")
    tracemalloc.start()
    assert sum(len(item["text"]) for item in json_items(text)) == 20_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"rows": [{"text": "a"}, {"text": "b"}]}', ["a", "b"]),
        ('\n{"rows":\n [{"text": "a"},\n {"text": "b"}]}\n\n', ["a", "b"]),
        ('{"text": "a"}\n\n', ["a"]),
        ('\ufeff{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        ('\ufeff[{"text": "a"},\n{"text": "b"}]', ["a", "b"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_shapes_of_a_json_file(
    content: str, texts: list[str], packed: bool, tmp_path: Path, build: Build, tokenizer: Any
) -> None:
    raw = content.encode()
    file = tmp_path / ("a.json.gz" if packed else "a.json")
    file.write_bytes(gzip.compress(raw) if packed else raw)
    assert _texts(build(file), tokenizer) == texts


def test_files_are_read_in_the_order_of_their_names(
    tmp_path: Path, build: Build, tokenizer: Any
) -> None:
    for stem, part in (("c", TEXTS[4:]), ("a", TEXTS[:2]), ("b", TEXTS[2:4])):
        _write("jsonl", tmp_path, part, stem)
    assert _texts(build(tmp_path), tokenizer) == TEXTS
    assert _texts(build(tmp_path, num_samples=3), tokenizer) == TEXTS[:3]


def test_ids_do_not_change_with_the_place_of_the_folder(tmp_path: Path, build: Build) -> None:
    for place in ("here", "there"):
        _write("jsonl", tmp_path / place / "chats", TEXTS)
    here, there = (build(tmp_path / place / "chats") for place in ("here", "there"))
    assert [s.sample_id for s in here.samples] == [s.sample_id for s in there.samples]
    assert here.identity == there.identity


def test_changed_content_changes_the_digest_of_the_content(tmp_path: Path, build: Build) -> None:
    _write("jsonl", tmp_path, TEXTS)
    before = build(tmp_path)
    _write("jsonl", tmp_path, [TEXTS[0].replace("0", "9"), *TEXTS[1:]])
    after = build(tmp_path)
    assert before.identity == after.identity, "known before a row is read"
    assert before.content != after.content
    json.dumps(after.identity)


def test_splits_by_name(tmp_path: Path, build: Build, tokenizer: Any) -> None:
    _write("jsonl", tmp_path, TEXTS[:2], "train-00000")
    _write("jsonl", tmp_path / "test", TEXTS[2:3], "a")
    assert _texts(build(tmp_path), tokenizer) == TEXTS[:2]
    assert _texts(build(tmp_path, dataset_split="test"), tokenizer) == TEXTS[2:3]
    with pytest.raises(CorpusError, match="no split 'dev'; expected one of test, train"):
        build(tmp_path, dataset_split="dev")


def test_split_of_files_without_names(tmp_path: Path, build: Build) -> None:
    _write("jsonl", tmp_path, TEXTS)
    with pytest.raises(CorpusError, match="'test' is requested, but file names contain no splits"):
        build(tmp_path, dataset_split="test")


def test_url(build: Build, tokenizer: Any) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus-test/a.jsonl", "\n".join(json.dumps({"text": t}) for t in TEXTS).encode())
    try:
        assert _texts(build("memory://corpus-test"), tokenizer) == TEXTS
        assert _texts(build("memory://corpus-test/a.jsonl"), tokenizer) == TEXTS
        with pytest.raises(CorpusError, match="holds no data"):
            build("memory://corpus-absent")
    finally:
        fs.rm("/corpus-test", recursive=True)
    with pytest.raises(CorpusError, match=r"nosuch://x: cannot be read.*driver"):
        build("nosuch://x")


@pytest.mark.parametrize("dictionary", [True, False])
def test_saved_dataset(dictionary: bool, tmp_path: Path, build: Build, tokenizer: Any) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS})
    saved = datasets.DatasetDict({"train": table, "test": table.select([5])})
    (saved if dictionary else table).save_to_disk(tmp_path / "saved")
    assert _texts(build(tmp_path / "saved", num_samples=5), tokenizer) == TEXTS[:5]
    if dictionary:
        test = build(tmp_path / "saved", dataset_split="test")
        assert _texts(test, tokenizer) == TEXTS[5:]
        with pytest.raises(CorpusError, match="no split 'dev'; expected one of test, train"):
            build(tmp_path / "saved", dataset_split="dev")


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: holds list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: is not UTF-8 text"),
        ("a.json", b'[{"text": "a"},\n nope]', "a.json, line 2: Expecting value"),
        ("a.json", b'["a"]', "a.json, item 1: holds str"),
        ("a.json", b'[{"text": "a"}\n\n{"text": "b"}]', "a.json, line 3: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"}]\n[]', "a.json, line 2: Extra data"),
        ("a.json", b'[{"text": "a"},\n {"text": "b', "a.json, line 2: Unterminated string"),
        ("a.json", b'{"text": "a",\n nope}', "a.json, line 2: Expecting property name"),
        ("a.json", b"12", "a.json, item 1: holds int"),
        ("a.json", b"", "a.json, line 1: Expecting value"),
        ("a.csv", b"id,text\n1,a\n2\n", "a.csv, record 2: has another number of fields"),
        ("a.parquet", b"not parquet", "a.parquet: is not a readable Parquet file"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.bin", b"x", "holds no data that can be read .found a.bin.; expected .parquet, .jsonl"),
    ],
)
def test_malformed_files_are_named(
    name: str, body: bytes, message: str, tmp_path: Path, build: Build
) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(CorpusError, match=message):
        build(tmp_path / name, on_bad_row="refuse")


def test_missing_file_is_no_hub_dataset(build: Build) -> None:
    for name in ("/no/such/folder", "./absent", "absent.jsonl", "some/chats.parquet"):
        with pytest.raises(CorpusError, match="no such file or folder"):
            build(name)


def test_hub_failure_says_what_was_tried(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/chats' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(CorpusError) as caught:
        build("owner/chats", dataset_config="small", dataset_revision="abc")
    message = str(caught.value)
    assert "owner/chats, configuration small, revision abc, split train" in message
    assert "HF_TOKEN" in message
    assert "local folder" in message
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_hub_dataset_end_to_end(
    build: Build, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A real builder of the library, with local files in the place of the hub's.
    import datasets

    _write("parquet", tmp_path / "files", TEXTS)
    real = datasets.load_dataset_builder

    def load(name: str, config: str | None, *, revision: str | None) -> Any:
        assert (name, config, revision) == ("owner/chats", None, "abc")
        files = str(tmp_path / "files" / "part.parquet")
        return real("parquet", data_files={"train": files}, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = build("owner/chats", dataset_revision="abc")
    assert _texts(corpus, tokenizer) == TEXTS
    assert corpus.identity["source"] == "hub/owner/chats/default/train"
    assert corpus.identity["content"]["revision"] == "abc"
    with pytest.raises(CorpusError, match=r'Unknown split "dev".*set --dataset_split'):
        build("owner/chats", dataset_revision="abc", dataset_split="dev")


def test_the_first_rows_of_a_hub_dataset_are_not_downloaded(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    texts = [f"text {number}" for number in range(400)]
    _write("jsonl", tmp_path / "files", texts)
    cache = tmp_path / "cache"
    real = datasets.load_dataset_builder

    def load(*_: Any, **__: Any) -> Any:
        files = str(tmp_path / "files" / "part.jsonl")
        return real("json", data_files={"train": files}, cache_dir=str(cache))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    chosen = CorpusSettings(dataset_name="owner/chats")
    few = open_source(chosen, few=True)
    assert isinstance(few, StreamedSource)
    (piece,) = few.pieces(1)
    rows = list(itertools.islice(few.read(piece), 300))
    assert [row.data["text"] for row in rows] == texts[:300]
    assert few.count(piece, 5) == 5
    assert not list(cache.rglob("*.arrow"))
    # Named like the whole: the same rows have the same ids, and the same of them are held out.
    whole = open_source(chosen)
    assert (whole.name, whole.total) == (few.name, 400)
    named = [row for part in whole.pieces(1 << 40) for row in whole.read(part)]
    assert [(row.key, row.place, row.data) for row in rows] == [
        (row.key, row.place, row.data) for row in named[:300]
    ]
    # Once it is downloaded, that is used; and a part of a split is not known without it.
    assert not isinstance(open_source(chosen, few=True), StreamedSource)
    with pytest.raises(CorpusError, match="set --dataset_split"):
        open_source(chosen.model_copy(update={"dataset_split": "dev"}), few=True)


def test_a_name_that_is_nearly_right(tmp_path: Path, build: Build) -> None:
    _write("jsonl", tmp_path, TEXTS)
    with pytest.raises(CorpusError, match=r"did you mean .*part\.jsonl\?$"):
        build(tmp_path / "prat.jsonl")
