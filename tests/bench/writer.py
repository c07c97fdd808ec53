"""Rate of encoding and writing relative to the teacher's, and how long the writer blocks the
engine.

`python -m tests.bench.writer` runs stage one's worker for real, the embedded teacher on vLLM with
one thread over its default corpus, reads the account that every worker keeps, and measures the CPU
time of both steps on the same shards, so that the ratio of the rates is that of the seconds.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from pipeline.cache.io.writer import commit_shard
from pipeline.corpus.settings import CorpusSettings
from pipeline.observe.shares import Shares, Summary, summary_line
from pipeline.storage import Store
from pipeline.teacher.capture.encode import encode_columns
from pipeline.teacher.capture.run import fill_cache
from pipeline.teacher.prepare import prepare
from pipeline.teacher.settings import CaptureSettings, TeacherSettings


def run(folder: Path, samples: int) -> tuple[float, float, Summary]:
    """Make a cache; return CPU seconds of teacher and writer for the same shards, and the account.

    The worker runs whole first. Then its steps run alone, one after the other: on a busy machine
    the wall time of a thread beside the engine says nothing of its work.
    """
    teacher = TeacherSettings()
    corpus = CorpusSettings(num_samples=samples, max_length=160, heldout_fraction=0.1)
    capture = CaptureSettings(shard_tokens=1000)
    shares, store = Shares(), Store(str(folder))
    prepared = prepare(teacher, corpus, capture, seed=42, cache_url=str(folder))
    task, work = prepared.capture, prepared.corpus
    assert work is not None
    with work.preparing(lease_s=capture.lease_s, shares=shares) as preparation:
        preparation.wait()  # so that nothing is tokenised beside what is measured
    fill_cache(
        task,
        store=store,
        command="bench-writer",
        resolved_config="",
        progress_every_s=60,
        shares=shares,
    )
    summary = shares.summary()
    engine = task.open_engine()
    teacher_s = writer_s = 0.0
    shards = task.source.shards
    for shard in [*shards[:1], *shards]:  # the first one warms up
        started = time.process_time()
        columns = engine.capture(shard.requests())
        captured = time.process_time()
        commit_shard(store, *encode_columns(task, shard, columns))
        teacher_s += captured - started
        writer_s += time.process_time() - captured
        if shard is shards[0]:
            teacher_s, writer_s = captured - started, time.process_time() - captured
    engine.close()
    return teacher_s, writer_s, summary


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        teacher_s, writer_s, summary = run(Path(scratch), arguments.samples)
    stalled = summary.seconds["waiting"] / (
        summary.seconds["teacher"] + summary.seconds["sparsifier"]
    )
    print(summary_line(summary))
    print(f"encoding and writing: {teacher_s / writer_s:.0f} times the teacher's rate, CPU time")
    print(f"the engine waits for the writer: {100 * stalled:.2f} % of its time")
    print(f"FIGURE encode_over_teacher_rate {teacher_s / writer_s:.1f}")
    print(f"FIGURE writer_stall_percent {100 * stalled:.3f}")


if __name__ == "__main__":
    main()
