"""What numba brings with it must not stop vLLM, whichever is loaded first."""

from __future__ import annotations

import numba
import pytest
from llvmlite.binding import ffi

from pipeline.teacher.engines.vllm import _let_vllm_look_at_llvmlite


def test_the_library_object_has_no_attributes_but_its_functions() -> None:
    for _ in range(2):
        _let_vllm_look_at_llvmlite()
        assert not hasattr(ffi.lib, "__dict__")
        with pytest.raises(AttributeError):
            ffi.lib.LLVMPY_NoSuchFunction  # noqa: B018
    assert ffi.lib.LLVMPY_GetVersionInfo() > 0
    assert numba.njit(lambda x: x + 1)(2) == 3
