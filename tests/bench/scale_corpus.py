"""What preparing a corpus costs a fleet: real workers, a real S3 server, one worker killed.

python -m tests.bench.scale --sections corpus
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.cache.layout.manifest import read_manifest
from pipeline.storage import Store
from tests import tiny
from tests.stage_runner import Running, start_stage

__all__ = ["figures"]

UNIT_MIB = 0.25
UNITS = 40
ROUNDS = 3


def figures() -> dict[str, float]:
    """Return the figures of this section."""
    with TemporaryDirectory() as folder, _s3() as bucket:
        bench = _Bench(Path(folder), bucket)
        two, eight = bench.requests_per_shard(2), bench.requests_per_shard(8)
        return {
            "corpus_tokenised_times": bench.tokenised_times(),
            "start_over_corpus_size": bench.start_over_size(),
            "fleet_requests_per_shard": eight,
            "fleet_requests_8_workers_over_2": eight / two,
        }


class _Bench:
    """A tiny teacher, and corpora of any size."""

    def __init__(self, folder: Path, bucket: str) -> None:
        self.folder, self.bucket = folder, bucket
        words = tiny.write_corpus(folder / "words")
        tokenizer = tiny.make_tokenizer(words)
        self.teacher = tiny.make_teacher(folder / "teacher", tokenizer)
        self.runs = 0

    def corpus(self, mib: float) -> Path:
        """Write chats of about so many MiB."""
        path = self.folder / f"{mib:g}.jsonl"
        draw = random.Random(3)
        words = ["open", "file", "read", "line", "list", "key", "name", "value", "error", "path"]
        size = 0
        with path.open("w") as out:
            while size < mib * (1 << 20):
                said = " ".join(draw.choices(words, k=draw.randint(5, 60)))
                turns = [("user", said), ("assistant", draw.choice(words))]
                chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
                size += out.write(json.dumps(chat) + "\n")
        return path

    def start(self, stage: str, url: str, corpus: Path, hook: tuple[Any, ...]) -> Running:
        """Start one worker."""
        self.runs += 1
        flags = [
            "--cache_dir", url, "--teacher_model", self.teacher, "--teacher.engine", "transformers",
            "--dataset_name", corpus, "--max_length", 128, "--corpus.unit_mib", UNIT_MIB,
            "--corpus.processes", 1, "--capture.shard_tokens", 4096, "--capture.top_k", 8,
        ]  # fmt: skip
        return start_stage(stage, flags, files=self.folder / f"log-{self.runs}", hook=hook)

    def tokenised_times(self) -> float:
        """Return the tokens that four workers tokenise, one killed, over those of the corpus."""
        corpus = self.corpus(UNITS * UNIT_MIB)
        url = str(self.folder / "tokenised")
        logs = [self.folder / f"units-{number}" for number in range(4)]
        workers = [
            self.start("prepare_corpus", url, corpus, ("note_units", str(log))) for log in logs
        ]
        while not logs[0].exists() or logs[0].read_text().count("begun") < 3:
            time.sleep(0.05)
            assert workers[0].process.is_alive(), workers[0].log()
        os.kill(workers[0].process.pid, signal.SIGKILL)
        for worker in workers[1:]:
            worker.wait(600).ok()
        lines = [line.split() for log in logs for line in log.read_text().splitlines()]
        tokens = {int(unit): int(count) for what, unit, count in lines if what == "done"}
        begun = sum(tokens[int(unit)] for what, unit, _ in lines if what == "begun")
        assert len(tokens) >= UNITS - 2
        return begun / sum(tokens.values())

    def start_over_size(self) -> float:
        """Return the time to the first row of a corpus 20 times as large, over that of it."""
        small, large = self.corpus(2 * UNIT_MIB), self.corpus(40 * UNIT_MIB)
        seconds: dict[Path, list[float]] = {small: [], large: []}
        for round_ in range(ROUNDS):
            for corpus in (small, large):
                mark = self.folder / f"first-{round_}-{corpus.name}"
                begun = time.monotonic()
                url = str(self.folder / f"start-{round_}-{corpus.stem}")
                self.start("cache_teacher", url, corpus, ("end_at_first_row", str(mark))).wait(600)
                seconds[corpus].append(float(mark.read_text()) - begun)
        return statistics.median(seconds[large]) / statistics.median(seconds[small])

    def requests_per_shard(self, workers: int) -> float:
        """Return all requests of a run to S3 over the shards that it made."""
        url = f"s3://{self.bucket}/{workers}-{uuid.uuid4().hex}"
        corpus = self.corpus(24 * UNIT_MIB)
        log = self.folder / f"requests-{workers}"
        log.touch()
        running = [
            self.start("cache_teacher", url, corpus, ("count_requests", str(log)))
            for _ in range(workers)
        ]
        for worker in running:
            worker.wait(900).ok()
        shards = read_manifest(Store(url)).total().shards
        return len(log.read_bytes()) / shards


@contextmanager
def _s3() -> Iterator[str]:
    """Run moto's server; yield a bucket."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bench")
    try:
        yield "bench"
    finally:
        server.stop()
