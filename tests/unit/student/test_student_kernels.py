"""Kernels of other packages: refused where they cannot run, applied to what they know."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.student.engine.kernels import apply_kernels, check_kernels


class _Model:
    def __init__(self, kind: str) -> None:
        self.config = types.SimpleNamespace(model_type=kind)


def test_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels("none", on_gpu=False)
    with pytest.raises(ConfigError, match="found liger on a machine without a GPU; expected none"):
        check_kernels("liger", on_gpu=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="found liger without the package liger-kernel"):
        check_kernels("liger", on_gpu=True)
    with pytest.raises(ConfigError, match="found hub without the package kernels"):
        check_kernels("hub", on_gpu=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    check_kernels("hub", on_gpu=True)


def test_liger_leaves_the_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[dict[str, Any]] = []
    name = "liger_kernel.transformers.monkey_patch"
    package: Any = types.ModuleType(name)
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    package._apply_liger_kernel_to_instance = lambda **options: applied.append(options)
    for part in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, package)
    model = _Model("llama")
    apply_kernels(model, "none")
    assert not applied
    apply_kernels(model, "liger")
    (options,) = applied
    assert options == {
        "model": model, "cross_entropy": False, "fused_linear_cross_entropy": False,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="found liger, which has none for new_model"):
        apply_kernels(_Model("new_model"), "liger")
