"""The writing generator itself, in this process: whose argmax, whose draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.teacher.generation.base import WriteRequest, Written
from pipeline.teacher.generation.settings import GenerateSettings
from pipeline.teacher.settings import TeacherSettings
from tests.tiny import TALKER_ENDS, TALKER_VOCABULARY


def _generator(talker: Path, ends: list[int], **chosen: Any) -> Any:
    from pipeline.teacher.generation.transformers import TransformersGenerator

    chosen = {"max_new_tokens": 12, "record_logprobs": True, **chosen}
    return TransformersGenerator(
        TeacherSettings(model=str(talker), engine="transformers", batch_tokens=256),
        GenerateSettings(enabled=True, **chosen),
        folder=talker,
        ends=ends,
        vocabulary=TALKER_VOCABULARY,
    )


def _requests() -> list[WriteRequest]:
    draw = np.random.default_rng(3)
    return [
        WriteRequest(str(n), draw.integers(3, 500, length).astype(np.int32), 1000 + n)
        for n, length in enumerate((5, 17, 1, 30, 9, 17, 2, 26))
    ]


def _ids(written: list[Written]) -> list[list[int]]:
    return [response.token_ids_N.tolist() for response in written]


def test_greedy_is_the_argmax_of_bare_forward_passes(talker: Path) -> None:
    """Left padding, batches and the key-value cache change nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    requests = _requests()
    done = _generator(talker, TALKER_ENDS, temperature=0, record_top_k=4).write(requests)
    lengths = set()
    for request, response in zip(requests, done, strict=True):
        ids = request.prompt_ids_L.tolist()
        assert response.top_ids_NK is not None
        for token, seen, top in zip(
            response.token_ids_N, response.logprobs_N, response.top_ids_NK, strict=True
        ):
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert int(logprobs[:TALKER_VOCABULARY].argmax()) == token
            assert logprobs[:TALKER_VOCABULARY].topk(4).indices.tolist() == top.tolist()
            assert float(logprobs[token]) == pytest.approx(float(seen), abs=1e-4)
            ids.append(int(token))
        assert len(response.token_ids_N) == 12 or ids[-1] in TALKER_ENDS
        lengths.add(len(response.token_ids_N))
    assert len(lengths) > 1, "nothing ended: the test has lost its meaning"


def test_a_draw_does_not_see_its_neighbours(talker: Path) -> None:
    requests = _requests()
    generator = _generator(talker, TALKER_ENDS)
    together = _ids(generator.write(requests))
    assert _ids(generator.write(requests)) == together
    assert _ids(generator.write(requests[::-1]))[::-1] == together
    assert [_ids(generator.write([request]))[0] for request in requests] == together
    other = [WriteRequest(r.response_id, r.prompt_ids_L, r.seed + 1) for r in requests]
    assert sum(a == b for a, b in zip(_ids(generator.write(other)), together, strict=True)) <= 1


def test_the_models_own_sampling_defaults_are_not_applied(talker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "opinionated"
    shutil.copytree(talker, folder)
    defaults = {"repetition_penalty": 3.0, "do_sample": True, "top_k": 1, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    expected = _ids(_generator(talker, TALKER_ENDS).write(_requests()))
    assert _ids(_generator(folder, TALKER_ENDS).write(_requests())) == expected
