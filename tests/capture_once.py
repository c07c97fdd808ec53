"""Capture the same requests with several engines' settings: `python -m tests.capture_once PLAN`.

PLAN is JSON: `folder` of the model, `requests` as [ids, rows], `top_k`, `temperatures`,
`max_length`, `out`, and `jobs`, each with a `name`, `teacher` settings and optionally `runs`,
`head_rows`, `temperatures`. Each run is written to `out` as NAME-RUN.npz: an array a request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import pipeline.cache.codec.kernels  # noqa: F401 - numba before vLLM, as where a cache is read first
from pipeline.teacher.engines.base import CaptureRequest
from pipeline.teacher.engines.registry import open_engine
from pipeline.teacher.settings import CaptureSettings, TeacherSettings
from pipeline.teacher.sparsify.device import SparseScheme

CAPTURED = "CAPTURED"
"""The last word of a process that came to its end."""


def main(file: str) -> None:
    """Carry out a plan."""
    plan = json.loads(Path(file).read_text())
    requests = [
        CaptureRequest(f"{number:032x}", np.array(ids, np.int32), np.array(rows, np.int64))
        for number, (ids, rows) in enumerate(plan["requests"])
    ]
    for job in plan["jobs"]:
        grid = tuple(job.get("temperatures", plan["temperatures"]))
        capture = CaptureSettings(
            top_k=plan["top_k"], temperatures=grid, head_rows=job.get("head_rows", 256)
        )
        engine = open_engine(
            TeacherSettings(model=plan["folder"], kv_cache_gib=0.25, **job["teacher"]),
            capture,
            folder=Path(plan["folder"]),
            scheme=SparseScheme(plan["top_k"], grid),
            max_length=plan["max_length"],
        )
        for run in range(job.get("runs", 1)):
            done = engine.capture(requests)
            target = Path(plan["out"]) / f"{job['name']}-{run}.npz"
            np.savez(target, **{str(number): columns for number, columns in enumerate(done)})
        engine.close()
    print(CAPTURED)


if __name__ == "__main__":
    main(sys.argv[1])
