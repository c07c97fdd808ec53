"""Which files, configuration, split and columns are read; what cannot be honoured is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.chat.conversation import Conversation, Document
from pipeline.errors import CorpusError
from tests.unit.corpus.interpreted import interpreted, raw_rows

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def _texts(path: Path | str, **settings: Any) -> list[str]:
    return [item.text for item in interpreted(path, **settings) if isinstance(item, Document)]


def _put(folder: Path, *names: str) -> Path:
    """Write a file of one row for each name; its text is the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def _rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_log_names_what_is_read_and_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _put(tmp_path, "train-0.jsonl", "test-0.jsonl", "more.jsonl", "b.csv", "_old/c.jsonl")
    _put(tmp_path, *(f"eval/{n}.jsonl" for n in range(9)))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "LICENSE").write_text("free")
    assert _texts(tmp_path) == ["train-0.jsonl"]
    read, left, other = (
        next(text for text in caplog.messages if word in text)
        for word in ("reading", "leaving out", "not data")
    )
    assert read.endswith("reading 1 files: train-0.jsonl")
    assert "leaving out 13 data files" in left
    for part in (
        "_old/c.jsonl (hidden: ",
        "b.csv (another kind than .jsonl)",
        "eval/0.jsonl, eval/1.jsonl, eval/2.jsonl, eval/3.jsonl, eval/4.jsonl and 5 more (another",
        "more.jsonl (no split in the name, while other files have one)",
    ):
        assert part in left
    assert other.endswith("not data: LICENSE, dataset_infos.json")
    levels = {record.message: record.levelname for record in caplog.records}
    assert (levels[read], levels[left]) == ("INFO", "WARNING")


def test_a_folder_that_is_read_whole_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _texts(_put(tmp_path, "a.jsonl", "b.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert not caplog.records


@pytest.mark.parametrize("setting", ["dataset_config", "dataset_revision"])
@pytest.mark.parametrize("source", ["file", "folder", "saved", "url", "embedded"])
def test_what_only_the_hub_has_is_refused(setting: str, source: str, tmp_path: Path) -> None:
    import datasets

    _put(tmp_path / "folder", "a.jsonl")
    name = {
        "file": str(tmp_path / "folder" / "a.jsonl"),
        "folder": str(tmp_path / "folder"),
        "saved": str(tmp_path / "saved"),
        "url": f"file://{tmp_path}/folder/a.jsonl",
        "embedded": "embedded",
    }[source]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(CorpusError, match=f"'small'.*leave out --corpus.{setting}"):
        interpreted(name, **{setting: "small"})


CARD = """---
license: mit
configs:
- config_name: en
  data_files: "en/*.jsonl"
- config_name: de{default}
  data_files:
  - split: train
    path: ["de/a*.jsonl", "de/more/*.jsonl"]
  - split: test
    path: de/t.jsonl
- config_name: fr
  data_dir: fr
---
# A dataset
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    names = ["en/x.jsonl", "de/a1.jsonl", "de/a2.jsonl", "de/t.jsonl", "de/more/z.jsonl"]
    _put(tmp_path, *names, "fr/train.jsonl", "fr/test.jsonl", "other.jsonl")
    (tmp_path / "README.md").write_text(CARD.format(default=""))
    return tmp_path


def test_a_copy_of_a_hub_dataset_honours_its_configurations(
    clone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _texts(clone, dataset_config="en") == ["en/x.jsonl"]
    assert "leaving out 7 data files" in caplog.text
    de = ["de/a1.jsonl", "de/a2.jsonl", "de/more/z.jsonl"]
    assert _texts(clone, dataset_config="de") == de
    assert _texts(clone, dataset_config="de", dataset_split="test") == ["de/t.jsonl"]
    assert _texts(clone, dataset_config="fr") == ["fr/train.jsonl"]
    assert _texts(f"file://{clone}", dataset_config="en") == ["en/x.jsonl"]
    assert [row.key for row in raw_rows(clone, dataset_config="en")] == ["en/x.jsonl:0"]


@pytest.mark.parametrize(
    "pattern", ["en/*.jsonl", "**/*.jsonl", "./de/?1.jsonl", "de/[az]*", "de/**", "de/**/z*"]
)
def test_patterns_mean_what_the_datasets_library_reads(pattern: str, clone: Path) -> None:
    import datasets

    card = f"---\nconfigs:\n- config_name: one\n  data_files: '{pattern}'\n---\n"
    (clone / "README.md").write_text(card)
    cache = str(clone.parent / "cache")
    table = datasets.load_dataset(str(clone), "one", split="train", cache_dir=cache)
    assert _texts(clone, dataset_config="one") == sorted(table["text"])


def test_several_configurations_are_not_mixed(clone: Path) -> None:
    with pytest.raises(CorpusError, match=r"declares 3 configurations.*expected one of en, de, fr"):
        interpreted(clone)
    with pytest.raises(CorpusError, match=r"'it' is requested.*expected one of en, de, fr"):
        interpreted(clone, dataset_config="it")
    with pytest.raises(CorpusError, match=r"configuration de has no split 'dev'.*train, test"):
        interpreted(clone, dataset_config="de", dataset_split="dev")
    with pytest.raises(CorpusError, match="dataset_revision 'v1' is for datasets of the hub"):
        interpreted(clone, dataset_config="de", dataset_revision="v1")
    (clone / "README.md").write_text(CARD.format(default="\n  default: true"))
    assert len(interpreted(clone)) == 3


def test_the_only_configuration_decides(tmp_path: Path) -> None:
    _put(tmp_path, "data/a.jsonl", "data/b.jsonl", "raw.jsonl")
    card = "---\nconfigs:\n- config_name: main\n  data_files: data/a.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert _texts(tmp_path) == ["data/a.jsonl"]
    (tmp_path / "README.md").write_text("# no front matter\n---\nconfigs: 1\n---\n")
    assert len(interpreted(tmp_path)) == 3
    for text in ("---\nconfigs: 1\n---\n", "---\nconfigs: [1]\n---\n", "---\n: [\n---\n"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(CorpusError, match=r"README.md: .*expected `configs:`"):
            interpreted(tmp_path)


def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(CorpusError, match=r"is a pointer of Git LFS.*git lfs pull"):
            interpreted(tmp_path / name)


@pytest.mark.parametrize(
    ("own", "fitting"), [(None, "train"), ("test", "test"), ("test[:50%]", "test")]
)
def test_the_split_of_a_dataset_saved_alone(own: str | None, fitting: str, tmp_path: Path) -> None:
    import datasets

    split = None if own is None else datasets.NamedSplit(own)
    table = datasets.Dataset.from_dict({"text": ["a"]}, split=split)
    table.save_to_disk(str(tmp_path / "saved"))
    assert _texts(tmp_path / "saved", dataset_split=fitting) == ["a"]
    other = "validation" if fitting == "train" else "train"
    with pytest.raises(CorpusError, match=f"of the split '{fitting}', not '{other}'.*{fitting}"):
        interpreted(tmp_path / "saved", dataset_split=other)


def test_a_column_is_refused_where_the_format_has_its_own(tmp_path: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c", "body": "b"})
    with pytest.raises(CorpusError, match=r"'body' is named.*prompt_completion has columns"):
        interpreted(path, column="body", format="prompt_completion")
    path = _rows(tmp_path / "b.jsonl", {"instruction": "p", "output": "c"})
    with pytest.raises(CorpusError, match=r"'output' is named.*instruction has columns"):
        interpreted(path, column="output", format="instruction")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("system_prompt", "Be kind."), ("chat_template", "{{ x }}"), ("template_options", {"a": 1})],
)
def test_settings_of_chats_are_refused_for_plain_text(
    setting: str, value: Any, tmp_path: Path
) -> None:
    path = _rows(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(CorpusError, match=f"is plain text, and {setting} is for chats"):
        interpreted(path, **{setting: value})
    assert interpreted(_rows(tmp_path / "b.jsonl", CHAT), **{setting: value})
    assert interpreted("embedded", num_samples=3, **{setting: value})


def test_settings_without_effect_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interpreted(_rows(tmp_path / "a.jsonl", {"text": "a"}), loss_on="all", reasoning="drop")
    assert "loss_on all has no effect on plain text" in caplog.text
    assert "reasoning drop has no effect on plain text" in caplog.text
    caplog.clear()
    interpreted(_rows(tmp_path / "b.jsonl", CHAT), add_bos=False, add_eos=False)
    assert "add_bos False has no effect on chats" in caplog.text
    assert "add_eos False has no effect on chats" in caplog.text
    caplog.clear()
    interpreted(tmp_path / "b.jsonl", loss_on="all")
    interpreted(tmp_path / "a.jsonl", add_eos=False)
    assert not caplog.records


def test_the_columns_read_and_not_read_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    row = {**CHAT, "id": 1, "tools": [], "chosen\ud83d": "x"}
    interpreted(_rows(tmp_path / "a.jsonl", row))
    assert (
        "format messages; columns read: messages, tools; not read: id, chosen\\ud83d" in caplog.text
    )


def test_the_column_that_fits_is_read_not_the_first_of_its_kind(tmp_path: Path) -> None:
    rows = {"messages": None, "chat": "x", "conversations": [{"from": "human", "value": "q"}]}
    (found,) = interpreted(_rows(tmp_path / "a.jsonl", rows))
    assert found == Conversation([{"role": "user", "content": "q"}])
    (found,) = interpreted(tmp_path / "a.jsonl", format="sharegpt")
    assert found == Conversation([{"role": "user", "content": "q"}])


def test_a_file_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(CorpusError, match="is not Unicode; rename the file"):
        interpreted(tmp_path)
