"""A second worker compares what it runs on with the first one's, and says where it differs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cache.layout.names import ENVIRONMENT
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.teacher.capture.environment import agree_on_environment, describe_environment
from pipeline.teacher.capture.identity import cache_identity
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.settings import TeacherSettings

FIRST = {
    "device": "NVIDIA A100-SXM4-80GB", "torch": "2.14.0", "cuda": "13.0",
    "attention_backend": "FLASH_ATTN", "batch_invariant": False,
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_the_first_worker_records_and_its_like_agree(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        agree_on_environment(store, FIRST)
    assert not caplog.messages


def test_another_device_is_told(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    agree_on_environment(store, FIRST)
    agree_on_environment(store, {**FIRST, "device": "NVIDIA H100 80GB HBM3", "cuda": "13.1"})
    (line,) = caplog.messages
    assert "device 'NVIDIA A100-SXM4-80GB' there, 'NVIDIA H100 80GB HBM3' here" in line
    assert "cuda '13.0' there, '13.1' here" in line
    assert "torch" not in line


@pytest.mark.parametrize(
    ("name", "value"), [("attention_backend", "FLASHINFER"), ("batch_invariant", True)]
)
def test_what_is_chosen_otherwise_is_refused(store: Store, name: str, value: object) -> None:
    agree_on_environment(store, FIRST)
    with pytest.raises(CacheError, match=r"another environment \(.* there, .* here\).*set what"):
        agree_on_environment(store, {**FIRST, name: value})


def test_a_damaged_record_is_made_again(store: Store) -> None:
    store.write(ENVIRONMENT, b"{")
    agree_on_environment(store, FIRST)
    agree_on_environment(store, FIRST)
    assert b"FLASH_ATTN" in store.read(ENVIRONMENT)


def test_what_the_last_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    engine: Any = SimpleNamespace(attention="CPU_ATTN")
    teacher: Any = SimpleNamespace(
        settings=TeacherSettings(), info=EngineInfo("vllm", "0.32", "float32", "cpu")
    )
    found = describe_environment(teacher, engine)
    assert found["engine_process"] == "its own"
    assert found["batch_invariant"] is True
    assert found["attention_backend"] == "CPU_ATTN"
    assert found["device"]
    assert found["torch"]
    assert found["triton"] == "", "a CPU runs none of its kernels"
    assert found["numba"] == version("numba"), "its loops are numba's"
    teacher.info = EngineInfo("vllm", "0.32", "float32", "cuda")
    assert describe_environment(teacher, engine)["numba"] == ""


def test_what_is_asked_for_is_in_the_identity() -> None:
    class Tokenizer:
        def __len__(self) -> int:
            return 3

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 2}

    part: Any = SimpleNamespace(to_json=dict, name="m", revision="r")

    def teacher(**more: Any) -> dict[str, Any]:
        found: dict[str, Any] = cache_identity(
            teacher=part, engine=EngineInfo("vllm", "0.32", "bfloat16", "cuda", "float32"),
            tokenizer=Tokenizer(), corpus_identity={}, scheme=part, spec=part, shard_tokens=1,
            batch_tokens=2, head_rows=3, **more,
        )["teacher"]  # fmt: skip
        return found

    plain = teacher()
    assert plain["head_dtype"] == "float32"
    assert not {"engine_options", "batch_invariant", "tensor_parallel_size"} & plain.keys()
    changed = teacher(parallel=2, options={"quantization": "fp8"}, batch_invariant=True)
    assert changed == {
        **plain, "tensor_parallel_size": 2, "engine_options": {"quantization": "fp8"},
        "batch_invariant": True,
    }  # fmt: skip
