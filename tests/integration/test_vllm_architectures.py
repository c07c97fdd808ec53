"""Teachers that vLLM treats by their architecture's name, or serves by transformers' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Tiny
from tests.stage_runner import run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIGURED = """
import sys
from pathlib import Path
from pipeline.models.resolve import read_model_config
from pipeline.teacher.engines.base import EngineInfo
from pipeline.teacher.engines.vllm import _capture_options, _captured_by
from pipeline.teacher.engines.vllm_options import common_options
from pipeline.teacher.engines.vllm_plan import CapturePlan, planned_capture
from pipeline.teacher.engines.vllm_start import set_environment
from pipeline.teacher.settings import TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    set_environment("cpu")
    from vllm.engine.arg_utils import EngineArgs

    settings = TeacherSettings(model=str(folder), kv_cache_gib=0.25, batch_tokens=128)
    info = EngineInfo("vllm", "any", "bfloat16", "cpu")
    plan = CapturePlan(SparseScheme(5, (1.0,)), 7)
    own = {"max_model_len": 64, "max_num_batched_tokens": 128, "enable_prefix_caching": False}
    own |= _capture_options(read_model_config(folder), info, settings)
    options = common_options(folder, settings, info, own)
    options |= _captured_by(plan, options)
    config = EngineArgs(**options).create_engine_config()
    assert config.model_config.runner_type == "pooling"
    assert planned_capture(config.additional_config) == plan
    print("FOUND", config.model_config.architecture, config.cache_config.mamba_ssm_cache_dtype)
"""


def test_an_architecture_keeps_what_vllm_does_by_its_name(tmp_path: Path) -> None:
    """Nemotron-H's state is float32 by such a rule; of a bfloat16 state logits are silently off."""
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=64,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    config.architectures = ["NemotronHForCausalLM"]
    config.save_pretrained(tmp_path)
    file = tmp_path.parent / "configured.py"
    file.write_text(CONFIGURED)
    result = run_python([file, tmp_path], env={"PYTHONPATH": "."}, timeout=600).ok()
    assert "FOUND NemotronHForCausalLM float32" in result.out


REMOTE = '''
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class BroughtConfig(LlamaConfig):
    model_type = "brought_along"


class BroughtModel(LlamaModel):
    config_class = BroughtConfig


class BroughtForCausalLM(LlamaForCausalLM):
    """An architecture that neither vLLM nor transformers knows."""

    config_class = BroughtConfig
'''
CAPTURE = """
import json, sys
from pathlib import Path
import numpy as np
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.registry import open_engine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

if __name__ == "__main__":
    folder, out, teacher = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    draw = np.random.default_rng(5)
    requests = [
        CaptureRequest(str(n), draw.integers(3, 300, size).astype(np.int32), np.arange(size - 1))
        for n, size in enumerate((90, 17, 64, 100, 40, 9, 71, 30))
    ]
    engine = open_engine(
        TeacherSettings(model=str(folder), kv_cache_gib=0.25, trust_remote_code=True, **teacher),
        CaptureSettings(top_k=20, temperatures=(1.0, 2.0)),
        folder=folder, scheme=SparseScheme(20, (1.0, 2.0)), max_length=120,
    )
    ticks = []
    columns = np.concatenate(engine.capture(requests, on_tokens=ticks.append))
    np.save(out, columns)
    assert sum(ticks) == sum(request.input_ids_L.size for request in requests)
    print("CAPTURED", engine.attention, ticks.count(0) > 1)
"""


def test_a_model_that_brings_its_code_and_options_by_name(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "brought"
    folder.mkdir()
    for file in tiny.teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "brought.py").write_text(REMOTE)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "brought_along", "architectures": ["BroughtForCausalLM"],
        "auto_map": {
            "AutoConfig": "brought.BroughtConfig",
            "AutoModel": "brought.BroughtModel",
            "AutoModelForCausalLM": "brought.BroughtForCausalLM",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    file = tmp_path / "capture.py"
    file.write_text(CAPTURE)
    found = {}
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    jobs: dict[str, dict[str, Any]] = {
        "vllm": {
            "batch_tokens": 128,
            "engine_options": {"max_num_seqs": 3, "hf_overrides": {"rope_parameters": rope}},
        },
        "plain": {"engine": "transformers"},
    }
    for name, teacher in jobs.items():
        if name == "plain":  # the override that vLLM was given, in the file
            (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
        out = tmp_path / f"{name}.npy"
        result = run_python(
            [file, folder, out, json.dumps(teacher)], env={"PYTHONPATH": "."}, timeout=600
        ).ok()
        assert "CAPTURED" in result.out
        assert "CAPTURED  " not in result.out, "attention has a name"
        found[name] = np.load(out)
    ours, theirs = found["vllm"], found["plain"]
    # Label log-prob, tail, log Z and entropies; entries may be in another order where they tie.
    np.testing.assert_allclose(ours[:, :6], theirs[:, :6], atol=1e-3)


def test_experts_states_and_latent_heads_agree_with_transformers(tmp_path: Path) -> None:
    """Three of `make check-architectures`; DeepSeek was off by nats on a CPU, in silence."""
    few = "Qwen3-MoE,Falcon-H1,DeepSeek V2"
    result = run_python(
        ["-m", "tests.bench.architectures", "--architectures", few, "--logs", tmp_path],
        timeout=600,
    ).ok()
    assert "FIGURE architectures_agreeing 3" in result.out
    assert float(result.out.rpartition(" ")[2]) < 1e-3
