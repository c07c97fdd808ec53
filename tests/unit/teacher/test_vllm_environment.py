"""What must not stop vLLM: numba, whichever is loaded first, and samples of the model's length."""

from __future__ import annotations

import os

import numba
import pytest
from llvmlite.binding import ffi

from pipeline.teacher.engines.vllm import (
    _let_vllm_look_at_llvmlite,
    let_vllm_read_all_positions,
)


def test_the_library_object_has_no_attributes_but_its_functions() -> None:
    for _ in range(2):
        _let_vllm_look_at_llvmlite()
        assert not hasattr(ffi.lib, "__dict__")
        with pytest.raises(AttributeError):
            ffi.lib.LLVMPY_NoSuchFunction  # noqa: B018
    assert ffi.lib.LLVMPY_GetVersionInfo() > 0
    assert numba.njit(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize(
    ("config", "max_length", "is_set"),
    [
        ({"max_position_embeddings": 512}, 512, True),
        ({"text_config": {"max_position_embeddings": 512}}, 512, True),
        ({"n_positions": 512}, 512, True),
        ({"max_position_embeddings": 512}, 511, False),
        ({"max_position_embeddings": 512}, 513, False),  # refused before, and by vLLM
        ({}, 512, False),
    ],
)
def test_samples_may_be_as_long_as_the_model_has_positions(
    config: dict[str, object], max_length: int, is_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    let_vllm_read_all_positions(config, max_length)
    assert (os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1") == is_set
    # What was set here is not left to other tests.
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
