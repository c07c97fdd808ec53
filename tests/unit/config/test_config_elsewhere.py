"""A flag of the other stage is rejected, with the stage it belongs to."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from stages import cache_teacher, train_student


def test_a_flag_of_stage_one_is_named_in_stage_two() -> None:
    with pytest.raises(ConfigError) as caught:
        train_student.main(["--dataset_name", "x", "--alhpa", "1"])
    first, second = caught.value.mistakes
    assert first == "--dataset_name: unknown flag here; it belongs to stage one, cache-teacher"
    assert "did you mean --alpha?" in second


def test_a_flag_of_stage_two_is_named_in_stage_one() -> None:
    with pytest.raises(ConfigError, match="it belongs to stage two, train-student"):
        cache_teacher.main(["--save_steps", "5"])
