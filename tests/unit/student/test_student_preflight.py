"""The parts of the last look before a run, each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.api.settings import StudentRun
from pipeline.cache.io.reader import Cache, open_cache
from pipeline.cache.io.token_ids import shard_token_ids
from pipeline.config.mistakes import validated
from pipeline.errors import ConfigError, Mistakes, ModelError, ResumeError, StoreError
from pipeline.storage.local import require_writable
from pipeline.student.preflight import _check_pieces
from pipeline.student.settings.student import LoraSettings, StudentSettings
from pipeline.student.settings.train import TrainSettings
from pipeline.student.training.checkpoint import (
    Checkpoints,
    RunIdentity,
    fitting_processes,
    newest_complete,
)
from pipeline.student.training.optimizer import check_schedule
from tests.unit.cache.sample_cache import read_all, write_cache


def test_mistakes_of_several_kinds_are_one_message() -> None:
    mistakes = Mistakes()
    mistakes.raise_any()
    with mistakes.collected():
        raise ResumeError("the first")
    with pytest.raises(ResumeError, match=r"^the first\.$"):
        mistakes.raise_any()
    with mistakes.collected():
        raise ResumeError("the first")
    with pytest.raises(ResumeError, match=r"^the first\.$"):
        mistakes.raise_any()
    with mistakes.collected():
        raise StoreError("the second", do="do this")
    with pytest.raises(Exception, match="2 reasons why this run cannot be:") as caught:
        mistakes.raise_any()
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    mistakes.add("the third")
    with pytest.raises(ConfigError) as caught_config:
        mistakes.raise_any()
    assert caught_config.value.mistakes == ("the first", "the second; do this", "the third")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eval_steps": 5, "evaluate": "never"}, "train.eval_steps: found 5 with train.evaluate"),
        ({"offload_optimizer": True, "zero_stage": 0}, "train.offload_optimizer: found true with"),
    ],
)
def test_settings_that_contradict_each_other(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainSettings.model_validate(wrong)


def test_all_that_cannot_go_together_is_said_at_once() -> None:
    wrong = {
        "zero_stage": 2, "offload_parameters": True, "quantized_weights": True, "ema_decay": 0.9,
        "torch_compile": True, "eval_steps": 5, "evaluate": "never", "profile_steps": "5:2",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        validated(StudentRun, {"train": wrong, "student": {"keep_layers": [], "freeze": ["a"],
                                                           "layers_to_unfreeze": "b"}})  # fmt: skip
    names = [line.split(":")[0] for line in caught.value.mistakes]
    assert sorted(names) == sorted([
        "student.keep_layers", "student.layers_to_unfreeze and student.freeze",
        "train.offload_parameters", "train.quantized_weights", "train.profile_steps",
        "train.eval_steps", "train.ema_decay", "train.torch_compile",
    ])  # fmt: skip


def test_settings_without_effect_and_without_sense() -> None:
    with pytest.raises(ValidationError, match=r"without student\.lora\.rank"):
        LoraSettings(save_adapter=True)
    with pytest.raises(ValidationError, match="expected layer 0 first or not at all"):
        StudentSettings(keep_layers=(2, 0), reconstruct="least_squares")


def test_a_run_evaluates_unless_both_are_off() -> None:
    assert TrainSettings().evaluates
    assert TrainSettings(evaluate="never").evaluates
    assert TrainSettings(evaluate_before=False).evaluates
    assert not TrainSettings(evaluate="never", evaluate_before=False).evaluates


def test_a_schedule_that_transformers_refuses() -> None:
    settings = TrainSettings(lr_scheduler_type="polynomial", learning_rate=1e-8)
    with pytest.raises(ConfigError, match=r"polynomial is refused \(lr_end"):
        check_schedule(settings, total_steps=5)
    check_schedule(TrainSettings(warmup_ratio=1.0), total_steps=1)


def test_an_output_folder_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below" / "it"):
        with pytest.raises(StoreError, match=r"is a file; .* choose another --output_dir"):
            require_writable(place, "output.output_dir")
    require_writable(tmp_path / "a" / "b", "output.output_dir")
    assert not (tmp_path / "a").exists()


def test_how_many_processes_make_the_step_of_a_checkpoint(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    for step, packs in ((1, 12), (2, None)):
        identity = RunIdentity({"train": {} if packs is None else {"packs_per_step": packs}})
        made = Checkpoints(tmp_path, identity, keep=5)
        made.folder(step).mkdir(parents=True)
        made.mark_complete(step, world_size=3)
    first, second = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    assert newest_complete(tmp_path) == second
    assert fitting_processes(first, packs_of_one=4) == 3
    assert fitting_processes(first, packs_of_one=12) == 1
    assert fitting_processes(first, packs_of_one=5) is None
    assert fitting_processes(first, packs_of_one=24) is None
    assert fitting_processes(second, packs_of_one=7) == 3
    assert fitting_processes(tmp_path / "nowhere", packs_of_one=1) is None


@dataclass
class _Vocabulary:
    lacked: Any


@dataclass
class _Inputs:
    cache: Cache
    vocabulary: _Vocabulary
    train: TrainSettings


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write_cache(str(tmp_path / "cache"))
    return open_cache(str(tmp_path / "cache"))


def test_the_ids_of_a_split_are_those_of_its_rows(cache: Cache) -> None:
    rows = np.concatenate([row.input_ids_L for row in read_all(cache)])
    shards = [ids for split in ("train", "heldout") for _, ids in shard_token_ids(cache, split)]
    assert np.array_equal(np.concatenate(shards), rows)
    Path(cache.store.path("data/train/00000.parquet")).unlink()
    assert [path for path, _ in shard_token_ids(cache, "train")] == ["data/train/00001.parquet"]


def test_a_piece_that_no_row_for_probing_holds(cache: Cache) -> None:
    """The shard after the first rows holds it: training would get as far as that row."""
    (_, first), (path, second) = shard_token_ids(cache, "train")
    only = next(iter(set(second.tolist()) - set(first.tolist())))

    def lacked(ids: NDArray[Any]) -> list[str]:
        return ["<|other|>"] if only in ids else []

    inputs: Any = _Inputs(cache, _Vocabulary(lacked), TrainSettings())
    with pytest.raises(ModelError) as caught:
        _check_pieces(inputs)
    message = str(caught.value)
    assert message.startswith(f"the cache's sequences hold '<|other|>' (in {path}), which is no")
    inputs.vocabulary.lacked = lambda ids: []
    _check_pieces(inputs)
    inputs.vocabulary.lacked = None
    _check_pieces(inputs)
