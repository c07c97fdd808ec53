"""vLLM writes what transformers would: greedy tokens, the rule of the draws, and the capture after.

One process of vLLM writes, closes its engine and captures over what it wrote; then stage one does.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.teacher.generation.base import WriteRequest
from pipeline.teacher.generation.registry import open_generator
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings
from tests.conftest import Tiny, digests
from tests.stage_runner import real_stage, run_python

pytestmark = pytest.mark.slow

ENDS = list(range(100, 140))
VOCABULARY = 528
DRAWS = 3000
FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05}
WRITE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.registry import open_engine
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.generation.base import WriteRequest
from pipeline.teacher.generation.registry import open_generator
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

plan = json.loads(Path(sys.argv[1]).read_text())
teacher = TeacherSettings(model=plan["folder"], kv_cache_gib=0.25, batch_tokens=256)
requests = [
    WriteRequest(str(n), np.array(ids, np.int32), seed)
    for n, (ids, seed) in enumerate(plan["requests"])
]


def write(requests, calls=1, **chosen):
    settings = GenerateSettings(enabled=True, record_logprobs=True, **chosen)
    generator = open_generator(
        teacher, settings, folder=Path(plan["folder"]), ends=plan["ends"],
        vocabulary=plan["vocabulary"], max_length=64,
    )
    told = []
    done = [generator.write(requests, on_responses=told.append) for _ in range(calls)]
    if calls > 1:
        done.append(generator.write(requests[3:5]))
    generator.close()
    assert sum(told) == calls * len(requests), told
    return [
        [(r.token_ids_N.tolist(), r.logprobs_N.astype(float).tolist()) for r in call]
        for call in done
    ]


def named(requests):
    settings = GenerateSettings(enabled=True, record_top_k=25, temperature=0, max_new_tokens=5)
    generator = open_generator(
        teacher, settings, folder=Path(plan["folder"]), ends=plan["ends"],
        vocabulary=plan["vocabulary"], max_length=64,
    )
    done = generator.write(requests)
    generator.close()
    return done



top = named(requests[:4])
(greedy,) = write(requests, temperature=0, max_new_tokens=12)
first, second, part = write(requests, calls=2, max_new_tokens=12)
draws = [
    WriteRequest(str(n), requests[1].prompt_ids_L, (n * 0x9E3779B97F4A7C15) >> 1 & (1 << 62) - 1)
    for n in range(plan["draws"])
]
(many,) = write(draws, max_new_tokens=1, **plan["filters"])
engine = open_engine(
    teacher, CaptureSettings(top_k=8), folder=Path(plan["folder"]),
    scheme=SparseScheme(8, (1.0, 2.0)), max_length=64,
)
captures = []
for request, (ids, _) in zip(requests, first):
    whole = np.concatenate([request.prompt_ids_L, np.array(ids, np.int32)])
    start = request.prompt_ids_L.size - 1
    captures.append(CaptureRequest(request.response_id, whole, np.arange(start, whole.size - 1)))
label = [columns[:, 0].astype(float).tolist() for columns in engine.capture(captures)]
asked = []
for request, one in zip(requests, top):
    whole = np.concatenate([request.prompt_ids_L, one.token_ids_N])
    rows = np.arange(request.prompt_ids_L.size - 1, whole.size - 1)
    asked.append(CaptureRequest(request.response_id, whole, rows, one.top_ids_NK))
# With others that ask for nothing, and for fewer, in one step.
asked[1] = replace(asked[1], requested_NK=None)
asked[2] = replace(asked[2], requested_NK=asked[2].requested_NK[:, :3])
wide = [columns.astype(float).tolist() for columns in engine.capture(asked)]
engine.close()
Path(sys.argv[2]).write_text(json.dumps({
    "greedy": greedy, "first": first, "second": second, "part": part, "label_logprob": label,
    "many": [ids[0] for ids, _ in many],
    "top": [(r.token_ids_N.tolist(), r.top_ids_NK.tolist()) for r in top], "wide": wide,
}))
print("WRITTEN")
"""


@pytest.fixture(scope="module")
def talker(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny teacher with so many end tokens that many of its responses end."""
    folder = tmp_path_factory.mktemp("talker") / "teacher"
    shutil.copytree(tiny.teacher, folder)
    file = folder / "generation_config.json"
    # Sampling defaults of the model's own must not be applied behind our settings.
    opinions = {"eos_token_id": ENDS, "repetition_penalty": 3.0, "top_k": 1}
    file.write_text(json.dumps({**json.loads(file.read_text()), **opinions}))
    return folder


def _requests() -> list[WriteRequest]:
    draw = np.random.default_rng(3)
    return [
        WriteRequest(str(n), draw.integers(3, 500, length).astype(np.int32), (1 << 62) + n)
        for n, length in enumerate((5, 17, 1, 30, 9, 17, 2, 26))
    ]


@pytest.fixture(scope="module")
def written(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("written")
    plan = {
        "folder": str(talker), "ends": ENDS, "vocabulary": VOCABULARY, "draws": DRAWS,
        "filters": FILTERS,
        "requests": [(r.prompt_ids_L.tolist(), r.seed) for r in _requests()],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    result = run_python(["-c", WRITE, folder / "plan.json", folder / "out.json"], timeout=290)
    assert "WRITTEN" in result.ok().out
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def _logprobs(talker: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1))


def test_greedy_is_transformers_greedy(talker: Path, written: dict[str, Any]) -> None:
    generator = open_generator(
        TeacherSettings(model=str(talker), engine="transformers", batch_tokens=256),
        GenerateSettings(enabled=True, temperature=0, max_new_tokens=12, record_logprobs=True),
        folder=talker, ends=ENDS, vocabulary=VOCABULARY, max_length=64,
    )  # fmt: skip
    theirs = generator.write(_requests())
    assert len({len(ids) for ids, _ in written["greedy"]}) > 1, "nothing ended early"
    for (ids, logprobs), response in zip(written["greedy"], theirs, strict=True):
        assert ids == response.token_ids_N.tolist()
        np.testing.assert_allclose(logprobs, response.logprobs_N, atol=1e-3)


def test_a_call_gives_the_same_tokens_and_a_draw_does_not_see_its_neighbours(
    written: dict[str, Any],
) -> None:
    assert written["first"] == written["second"]
    assert [ids for ids, _ in written["part"]] == [ids for ids, _ in written["first"][3:5]]
    ended = [ids[-1] in ENDS for ids, _ in written["first"]]
    assert any(ended)
    assert all(end or len(ids) == 12 for end, (ids, _) in zip(ended, written["first"], strict=True))
    assert max(max(ids) for ids, _ in written["first"]) < VOCABULARY


def test_the_capture_says_what_the_sampling_saw(written: dict[str, Any]) -> None:
    for label, (_, logprobs) in zip(written["label_logprob"], written["first"], strict=True):
        np.testing.assert_allclose(label, logprobs, atol=1e-3)


def test_what_the_writer_finds_likeliest_is_captured(talker: Path, written: dict[str, Any]) -> None:
    columns = 2 + 2 * 2 + 2 * 8
    for request, (ids, top), wide, asked in zip(
        _requests(), written["top"], written["wide"], (25, 0, 3, 25), strict=False
    ):
        assert np.shape(wide) == (len(ids), columns + asked)
        for n, token in enumerate(ids):
            logprobs = _logprobs(talker, [*request.prompt_ids_L.tolist(), *ids[:n]])
            # Of the 25 likeliest rows of the head, those that only pad it are no candidates.
            there = [one for one in top[n] if one >= 0]
            assert len(there) < 25 or max(there) < VOCABULARY
            assert there[0] == token
            least = min(logprobs[one] for one in there)
            assert least > np.sort(logprobs)[-25] - 1e-3
            for place in range(asked):
                value = wide[n][columns + place]
                if top[n][place] < 0:
                    assert value == 1.0
                else:
                    assert value == pytest.approx(logprobs[top[n][place]], abs=1e-3)


def test_draws_follow_the_rule(talker: Path, written: dict[str, Any]) -> None:
    """The filters in the order that `seeded_sampling` takes them in."""
    p = np.exp(_logprobs(talker, _requests()[1].prompt_ids_L.tolist()) / FILTERS["temperature"])
    p[VOCABULARY:] = 0
    p /= p.sum()
    p[p < FILTERS["min_p"] * p.max()] = 0
    p[p < np.sort(p)[-FILTERS["top_k"]]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= FILTERS["top_p"]]] = 0
    p /= p.sum()
    counts = np.bincount(written["many"], minlength=p.size)
    kept = p > 0
    assert 3 < kept.sum() <= FILTERS["top_k"]
    assert counts[~kept].sum() == 0
    expected = p[kept] * DRAWS
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_stage_one_writes_and_captures_to_the_same_bytes_twice(
    tiny: Tiny, talker: Path, tmp_path: Path
) -> None:
    flags = [
        *tiny.stage_one, "--teacher_model", talker, "--teacher.engine", "vllm",
        "--teacher.kv_cache_gib", "0.25", "--num_samples", "24", "--generate.enabled",
        "--generate.max_new_tokens", "14", "--generate.responses", "2", "--generate.prompt_tokens",
        "5", "--generate.shard_prompts", "10", "--generate.record_logprobs",
    ]  # fmt: skip
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        real_stage("cache_teacher", [*flags, "--cache_dir", folder], timeout=280).ok()
        content = digests(folder)
        del content["README.md"], content["_meta/config.yaml"]
        found.append(content)
    assert found[0] == found[1]
    files = sorted((tmp_path / "one/_meta/responses").glob("*.parquet"))
    responses = {r["response_id"]: r for file in files for r in pq.read_table(file).to_pylist()}
    cache = open_cache(str(tmp_path / "one"))
    rows = [
        row
        for split in ("train", "heldout")
        for shard, count in enumerate(cache.source(split).shard_rows())
        for row in cache.source(split).read_rows(shard, range(count))
    ]
    assert len(rows) == len(responses) == 48
    for row in rows:
        response = responses[row.sample_id]
        assert row.input_ids_L[row.loss_mask_L].tolist() == response["token_ids"]
        np.testing.assert_allclose(
            row.targets.label_logprob_N, response["logprobs"], rtol=0.031, atol=2e-3
        )
