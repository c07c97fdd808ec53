"""The whole promise at once: a cache in an S3 bucket, two ranks under ZeRO 3, a student in vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.storage import Store
from tests.conftest import Tiny
from tests.ranks import run_ranks
from tests.serving import assert_vllm_agrees
from tests.stage_runner import Running
from tests.unit.storage import conftest as storage_fixtures

s3_endpoint = storage_fixtures.s3_endpoint
bucket = storage_fixtures.bucket
AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@pytest.mark.slow
def test_two_ranks_train_from_a_bucket_and_vllm_serves_the_student(
    tiny: Tiny,
    tiny_cache: Path,
    bucket: str,
    start: Callable[..., Running],
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file
    from torch import testing

    url = f"s3://{bucket}/runs/cache"
    for file in tiny_cache.rglob("*"):
        if file.is_file():
            Store(url).write(file.relative_to(tiny_cache).as_posix(), file.read_bytes())
    flags = [
        *tiny.stage_two, "--per_device_train_batch_size", "1", "--train.zero_stage", "3",
        "--train.timeout_s", "90",
    ]  # fmt: skip
    remote = [*flags, "--cache_dir", url, "--output_dir", tmp_path / "remote"]
    ranks = run_ranks(start, 2, remote, env={name: os.environ[name] for name in AWS})
    first, second = (rank.ok().out for rank in ranks)
    assert f"student {tmp_path / 'remote/model'}" in first
    assert not second, "one process speaks for both"
    # From the disk, on one rank: the same student.
    local = [*flags, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "local"]
    run_ranks(start, 1, [*local, "--gradient_accumulation_steps", "2"])[0].ok()
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("remote", "local"))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        testing.assert_close(weight, b[name], rtol=1e-5, atol=1e-6, msg=name)
    assert_vllm_agrees(tmp_path / "remote/model", tmp_path)
