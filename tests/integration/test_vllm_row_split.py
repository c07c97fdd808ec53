"""Two tensor-parallel ranks of vLLM share the rows: the columns of one, but for a sum's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.stage_runner import ROOT, run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CAPTURE = """
import sys
from pathlib import Path
import numpy as np
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.vllm import VllmEngine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

if __name__ == "__main__":
    folder, size, out = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    draw = np.random.default_rng(0)
    requests = [
        CaptureRequest(
            f"{n:032x}", draw.integers(3, 250, 20 + n).astype(np.int32), np.arange(19 + n)
        )
        for n in range(4)
    ]
    settings = TeacherSettings(model=str(folder), batch_tokens=64, tensor_parallel_size=size)
    engine = VllmEngine(
        settings, CaptureSettings(head_rows=7), folder=folder,
        scheme=SparseScheme(9, (1.0, 2.0)), max_length=64,
    )
    np.save(out, np.concatenate(engine.capture(requests)))
    engine.close()
"""


def test_two_ranks_have_the_columns_of_one(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer, write_corpus

    folder = tmp_path / "teacher"
    make_tokenizer(write_corpus(tmp_path / "corpus")).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    script = tmp_path / "capture.py"
    script.write_text(CAPTURE)
    found = []
    for size in (2, 1):
        out = tmp_path / f"{size}.npy"
        env = {
            "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"[: 2 * size - 1],
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        run_python([script, folder, size, out], timeout=280, env=env).ok()
        found.append(np.load(out))
    assert found[0].shape == (19 + 20 + 21 + 22, 24)
    assert found[0].shape == found[1].shape
    np.testing.assert_allclose(found[0][:, :6], found[1][:, :6], atol=1e-5)
