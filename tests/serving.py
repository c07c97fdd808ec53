"""A finished student in vLLM: it writes what transformers writes, token for token."""

from __future__ import annotations

import json
from pathlib import Path

from tests.stage_runner import run_python

__all__ = ["assert_vllm_agrees"]


def assert_vllm_agrees(model: Path, tmp_path: Path) -> None:
    """Load the folder `model` in both and compare greedy tokens; vLLM in a process of its own."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import json, sys\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from vllm import LLM, SamplingParams\n"
        "folder, prompts = sys.argv[1], [[1, 40, 50, 60, 70], [1, 300, 2, 1, 90, 91, 92]]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()\n"
        "wanted = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False,\n"
        "          eos_token_id=None)[0, len(p):].tolist() for p in prompts]\n"
        "llm = LLM(model=folder, dtype='float32', max_model_len=64, enforce_eager=True,\n"
        "          kv_cache_memory_bytes=1 << 26, seed=0)\n"
        "params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)\n"
        "outputs = llm.generate([{'prompt_token_ids': p} for p in prompts], params)\n"
        "print(json.dumps([wanted, [list(o.outputs[0].token_ids) for o in outputs]]))\n"
    )
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0",
    }  # fmt: skip
    result = run_python([script, model], env=env, cwd=tmp_path).ok()
    wanted, found = json.loads(result.out.splitlines()[-1])
    assert found == wanted
    assert all(len(tokens) == 12 for tokens in found)
