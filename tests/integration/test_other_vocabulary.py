"""Students of other vocabularies, trained: ids mapped by content, and across tokenizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.evaluate.measures import HeldoutScores
from pipeline.observe.metrics import read_metrics
from tests.conftest import Stage, Tiny
from tests.other_vocabularies import permute_student
from tests.tiny import make_teacher, make_tokenizer


def _curve(folder: Path, name: str) -> list[float]:
    records = read_metrics(folder / "metrics.jsonl")
    return [record.values[name] for record in records if name in record.values]


def test_the_same_pieces_under_other_ids(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, stage: Stage, tmp_path: Path
) -> None:
    new = permute_student(tiny.teacher, tmp_path / "shuffled")
    run = tmp_path / "student"
    flags = [
        *tiny.stage_two, "--student_model", tmp_path / "shuffled", "--cache_dir", tiny_cache,
        "--output_dir", run,
    ]  # fmt: skip
    result = stage("train_student", flags).ok()
    (line,) = [line for line in result.err.splitlines() if "vocabulary mapped by content" in line]
    moved = sum(a != b for a, b in new.items())
    assert f"{len(new) - moved} pieces keep their id; {moved} are under another id" in line
    assert "5 are the student's alone: 'its-own-0'" in line
    # The extra pieces start at logit 0 and have a little mass; all else is the same model.
    for name in ("train/loss", "heldout/cross_entropy", "heldout/top1_agreement"):
        ours, theirs = _curve(run, name), _curve(tiny_run, name)
        assert len(ours) == len(theirs)
        assert ours == pytest.approx(theirs, rel=0.005), name
    # It is exported with its own tokenizer, ids and template, and predicts as its twin does.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    twin = AutoTokenizer.from_pretrained(tiny_run / "model")
    text = "the list of numbers<|im_end|>"
    ids, twin_ids = tokenizer(text).input_ids, twin(text).input_ids
    assert ids == [new[i] for i in twin_ids]
    assert ids != twin_ids
    assert tokenizer.chat_template == twin.chat_template
    assert tokenizer.eos_token_id == new[twin.eos_token_id]
    logits = []
    for folder, numbers in ((run, ids), (tiny_run, twin_ids)):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(torch.tensor([numbers])).logits[0])
    order = torch.tensor([new[i] for i in range(len(new))])
    mapped = logits[0][:, order].log_softmax(-1)
    assert torch.allclose(mapped, logits[1][:, : len(new)].log_softmax(-1), atol=0.02)
    card = (run / "model/README.md").read_text()
    assert "| vocabulary | mapped by content: " in card
    # The same command again has nothing to do; with the twin it is another run.
    assert "nothing to train" in stage("train_student", flags).ok().err


@pytest.fixture(autouse=True)
def _local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep lengths that are stored apart from the machine's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))


@pytest.fixture
def other(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a student of a smaller vocabulary, cut in other places, and of flat distributions."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    make_teacher(folder, make_tokenizer(tiny.corpus, size=330), seed=5, layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 0.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _flags(tiny: Tiny, cache: Path, other: Path, folder: Path) -> list[Any]:
    return [
        *tiny.stage_two, "--student.keep_layers", "none", "--student_model", other, "--cache_dir",
        cache, "--output_dir", folder,
    ]  # fmt: skip


def test_another_tokenizer_is_refused_with_the_way_across(
    tiny: Tiny, tiny_cache: Path, other: Path, stage: Stage, tmp_path: Path
) -> None:
    flags = _flags(tiny, tiny_cache, other, tmp_path / "student")
    message = stage("train_student", flags).refused(3)
    assert "the student's tokenizer differs from the cache's: " in message
    assert "missing (such as" in message
    assert "the cache's sequences hold " in message
    assert "--loss.cross_tokenizer uld --temperature 1" in message
    message = stage(
        "train_student", [*flags, "--loss.cross_tokenizer", "uld", "--temperature", "2"]
    ).refused(2)
    assert "loss.temperature: found 2 with loss.cross_tokenizer uld, expected 1" in message
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_across_tokenizers(
    tiny: Tiny, tiny_cache: Path, other: Path, stage: Stage, tmp_path: Path
) -> None:
    runs = {}
    for name, alpha in (("uld", "0.7"), ("control", "0")):
        runs[name] = tmp_path / name
        flags = [
            *_flags(tiny, tiny_cache, other, runs[name]), "--loss.cross_tokenizer", "uld",
            "--alpha", alpha, "--max_steps", "40", "--save_steps", "100",
        ]  # fmt: skip
        result = stage("train_student", flags).ok()
        found = re.search(r"across tokenizers: ([\d.]+) % of the student's supervised", result.err)
        assert found
        assert 30 < float(found[1]) < 100
    before = HeldoutScores.read(str(runs["uld"] / "heldout-before.json"))
    after = HeldoutScores.read(str(runs["uld"] / "heldout-after.json"))
    control = HeldoutScores.read(str(runs["control"] / "heldout-after.json"))
    assert set(after.sums) == {"uld", "cross_entropy"}
    assert 0 < sum(after.with_target) < sum(after.loss_tokens)
    # It learns both, and comes nearer to the teacher's shape than cross-entropy alone does.
    assert after.mean("uld").value < 0.5 * before.mean("uld").value
    assert after.mean("cross_entropy").value < before.mean("cross_entropy").value - 1
    assert after.mean("uld").value < 0.9 * control.mean("uld").value
    assert _curve(runs["uld"], "heldout/uld")
    assert not _curve(runs["uld"], "heldout/kl")
    card = (runs["uld"] / "model/README.md").read_text()
    assert "| | ULD to the teacher | cross-entropy (nats) | perplexity |" in card
    assert "top-1" not in card
    assert "another tokenizer than the teacher's" in card
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(runs["uld"] / "model")
    assert exported.get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()
    assert exported.chat_template == AutoTokenizer.from_pretrained(tiny.teacher).chat_template


def test_the_students_rows_are_the_same_text(tiny: Tiny, tiny_cache: Path, other: Path) -> None:
    from transformers import AutoTokenizer

    from pipeline.student.build.vocabulary import open_vocabulary

    cache = open_cache(str(tiny_cache))
    vocabulary = open_vocabulary(other, cache, cross_tokenizer="uld")
    teacher, student = (AutoTokenizer.from_pretrained(f) for f in (tiny.teacher, other))
    source = cache.source("train")
    for shard, count in enumerate(source.shard_rows()):
        theirs = source.read_rows(shard, range(count))
        ours = vocabulary.train.read_rows(shard, range(count))
        for a, b in zip(theirs, ours, strict=True):
            assert teacher.decode(a.input_ids_L) == student.decode(b.input_ids_L)
            assert int((b.targets.counts_N > 0).sum()) <= a.targets.num_positions
            assert b.targets.num_positions >= a.targets.num_positions / 2
            # The end of a turn is one token in both.
            ends = [int((row.input_ids_L == 2).sum()) for row in (a, b)]
            assert ends[0] == ends[1] > 0
