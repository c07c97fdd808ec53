"""The sweep file: what it may say, every mistake at once, points in order, names that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.api.settings import StudentRun
from pipeline.errors import ConfigError
from pipeline.sweeps.file import SweepFile, read_sweep_file
from pipeline.sweeps.plan import slug
from pipeline.sweeps.space import Range, Space, describe_values
from stages.sweep import read_space
from tests.stage_runner import ROOT


def _space(**content: Any) -> Space:
    return Space(StudentRun(), SweepFile.model_validate(content))


def _file(tmp_path: Path, **content: Any) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_grid_is_every_combination_in_the_order_of_the_file() -> None:
    space = _space(grid={"temperature": [1, 2], "loss.alpha": [0.5, 1.0]})
    assert not space.mistakes
    assert [point.label for point in space.points()] == [
        "temperature 1, alpha 0.5",
        "temperature 1, alpha 1",
        "temperature 2, alpha 0.5",
        "temperature 2, alpha 1",
    ]
    assert space.fields == ("loss.temperature", "loss.alpha")
    last = space.points()[-1].settings
    assert isinstance(last, StudentRun)
    assert (last.loss.temperature, last.loss.alpha) == (2.0, 1.0)


def test_points_say_every_field_that_varies_anywhere() -> None:
    space = _space(points=[{"seed": 1}, {"loss": {"alpha": 1.0}}])
    assert [p.values for p in space.points()] == [
        {"seed": 1, "loss.alpha": 0.5},
        {"seed": 42, "loss.alpha": 1.0},
    ]


def test_lists_can_be_swept_and_overrides_reach_every_point() -> None:
    space = _space(
        overrides={"train": {"max_steps": 7}, "learning_rate": "1e-3"},
        grid={"student.keep_layers": [[0, 1], [0, 1, 2]]},
    )
    assert not space.mistakes
    first = space.points()[0].settings
    assert isinstance(first, StudentRun)
    assert (first.train.max_steps, first.train.learning_rate) == (7, 1e-3)
    assert first.student.keep_layers == (0, 1)


def test_every_mistake_at_once_with_near_names() -> None:
    space = _space(
        overrides={"train.max_step": 3},
        grid={
            "loss.temprature": [1],
            "alpha": [0.5, 7],
            "seed": [],
            "output_dir": ["x"],
            "observe.log_level": ["info"],
            "loss.divergence": ["forward_kl", "foward_kl"],
        },
    )
    text = "\n".join(space.mistakes)
    for expected in (
        "overrides: train.max_step: unknown field; did you mean train.max_steps?",
        "grid: loss.temprature: unknown field; did you mean loss.temperature?",
        "grid: loss.alpha: found 7, expected less than or equal to 1",
        "grid: seed: found an empty list, expected values",
        "grid: output.output_dir: cannot be set here; each run has a folder of its own",
        "grid: observe.log_level: found in the space, expected a field that changes the student",
        "grid: loss.divergence: found 'foward_kl', expected 'forward_kl'",
    ):
        assert expected in text, text
    assert len(space.mistakes) == 7


def test_values_that_do_not_go_together_are_named_by_their_point() -> None:
    space = _space(grid={"divergence": [], "loss.tail": ["zero"]})
    assert space.mistakes
    space = _space(
        grid={"loss.divergence": ["forward_kl", "reverse_kl"], "loss.tail": ["auto", "zero"]}
    )
    assert not space.mistakes, "each value is good by itself"
    assert len(space.points()) == 3
    (mistake,) = space.mistakes
    assert mistake.startswith("divergence reverse_kl, tail zero: loss.tail: found zero with")


def test_a_value_is_judged_by_itself_even_where_the_base_disagrees() -> None:
    base = StudentRun.model_validate({"loss": {"divergence": "reverse_kl"}})
    file = SweepFile.model_validate({"grid": {"divergence": [], "loss.tail": ["zero"]}})
    file = SweepFile.model_validate(
        {"grid": {"loss.divergence": ["forward_kl"], "loss.tail": ["zero"]}}
    )
    space = Space(base, file)
    assert not space.mistakes
    assert len(space.points()) == 1


def test_the_same_point_twice() -> None:
    space = _space(grid={"temperature": [1, 1.0]})
    space.points()
    assert space.mistakes == ["temperature 1: this point is listed twice"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "found no space, expected exactly one of grid, points, search"),
        ({"grid": {}, "points": []}, "found grid and points, expected exactly one"),
        ({"grid": {"seed": 3}}, "grid.seed: found 3, expected list"),
        ({"gird": {"seed": [1]}}, "gird: unknown field; did you mean grid?"),
        ({"grid": {"seed": [1]}, "objectiv": "x"}, "objectiv: unknown field; did you mean objec"),
        ({"grid": {"seed": [1]}, "objective": "heldout/k"}, "did you mean heldout/kl?"),
        ({"grid": {"seed": [1]}, "objective": "kl"}, "expected a logged metric such as heldout/kl"),
        ({"grid": {"seed": [1]}, "objective": "time/x"}, "expected minimize or maximize"),
        ({"search": {"trials": 0}}, "search.trials: found 0, expected greater than or equal to 1"),
    ],
)
def test_the_files_own_keys(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_sweep_file(_file(tmp_path, **content))
    assert message in str(caught.value)


def test_a_setting_of_the_runs_at_the_top(tmp_path: Path) -> None:
    file = _file(tmp_path, grid={"seed": [1]}, train={"max_steps": 3}, learning_rate=1, trian={})
    with pytest.raises(ConfigError) as caught:
        read_sweep_file(file, StudentRun)
    said = {mistake.removeprefix(f"{file}: ") for mistake in caught.value.mistakes}
    assert said == {
        "train: found a setting of stage two, expected it under overrides, with one value, or "
        "under grid, with a list of values",
        "learning_rate: found a setting of stage two, expected it under overrides, with one "
        "value, or under grid, with a list of values",
        "trian: unknown field",
    }


def test_an_empty_space_is_refused() -> None:
    assert _space(grid={}).mistakes == [
        "grid: found no field, expected at least one with its values"
    ]
    assert _space(points=[]).mistakes == [
        "points: found an empty list, expected at least one point"
    ]
    assert _space(search={"space": {}}).mistakes == [
        "search.space: found no field, expected at least one"
    ]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"low": 1}, "expected a list of choices, or a mapping with low and high"),
        ({"low": 1, "high": 2, "lg": True}, "unknown key lg; did you mean log?"),
        ({"low": 2, "high": 1}, "found low 2 and high 1, expected low below high"),
        ({"low": 0, "high": 1, "log": True}, "found low 0 with log, expected more than 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "found both log and step"),
        ({"low": "x", "high": 2}, "expected numbers"),
        ({"low": -1, "high": 2}, "loss.temperature: found -1.0, expected greater than 0"),
    ],
)
def test_ranges(axis: Any, message: str) -> None:
    space = _space(search={"space": {"temperature": axis}})
    assert message in "\n".join(space.mistakes)


def test_a_range_of_a_text_and_a_pruner_without_evaluations() -> None:
    search = {"space": {"student_model": {"low": 1, "high": 2}}, "pruner": "median"}
    space = _space(search=search)
    assert "found a range for text, expected a list of choices" in space.mistakes[0]
    assert "found median without train.eval_steps" in space.mistakes[1]


def test_a_field_is_named_as_on_the_command_line() -> None:
    """By its last part too where no other field has that; habits of other trainers are answered."""
    space = _space(grid={"keep_layers": [[0, 1], [0, 2]], "freeze": [["embed_tokens"]]})
    assert not space.mistakes
    assert space.fields == ("student.keep_layers", "student.freeze")
    space = _space(grid={"lr": [1e-4], "epochs": [1]})
    told = "\n".join(space.mistakes)
    assert "grid: lr: unknown field; did you mean learning_rate?" in told
    assert "grid: epochs: unknown field; did you mean num_train_epochs?" in told


def test_yaml_numbers_that_are_texts_and_integers() -> None:
    space = _space(
        search={
            "space": {
                "learning_rate": {"low": "1e-5", "high": "1e-3", "log": True},
                "train.gradient_accumulation_steps": {"low": 1, "high": 4},
            }
        }
    )
    assert not space.mistakes
    assert space.axes["train.learning_rate"] == Range(1e-5, 1e-3, True)
    integer = space.axes["train.gradient_accumulation_steps"]
    assert isinstance(integer, Range)
    assert integer.integer
    assert len(space.corners()) == 3


def test_a_name_does_not_depend_on_the_order_of_the_lines() -> None:
    one = {"loss.temperature": 2.0, "loss.alpha": 0.5}
    other = {"loss.alpha": 0.5, "loss.temperature": 2.0}
    assert slug(one) == slug(other) == "alpha-0.5_temperature-2"
    assert describe_values(one) == "temperature 2, alpha 0.5"
    assert slug({"student.model": "/models/Qwen/tiny one"}) == "model-tiny-one"
    assert slug({"student.keep_layers": [0, 3]}) == "keep_layers-0.3"
    assert slug({"student.keep_layers": None}) == "keep_layers-none"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "stages/configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_projects_own_sweeps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = read_sweep_file(str(path))
    space = read_space(file)
    points = space.corners() if file.search else space.points()
    assert not space.mistakes
    assert (file.search.trials if file.search else len(points)) >= 4
    assert file.teacher_config is not None, "one command, from a clean checkout"
