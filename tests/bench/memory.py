"""Peak memory of stage one against the size of the corpus: 10 shards and 1,000 of the same size.

`python -m tests.bench.memory` runs the real stage with a tiny teacher, each corpus in a separate
process, and compares the largest resident sets (VmHWM). The last line is the baseline in which the
samples of the large corpus are held as Python objects.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from pipeline.observe.memory import peak_rss_bytes

FEW, MANY = 10, 1000
SHARD_TOKENS = 4096
WORDS = [
    "open", "file", "read", "line", "list", "key", "name", "value", "function", "error", "module",
    "path", "setting", "data",
]  # fmt: skip
PHASES = ("corpus and plan", "teacher", "manifest")


def write_corpus(file: Path, *, tokens: int, tokens_of: Callable[[Any], int]) -> int:
    """Write short chats of about this many tokens in total; return their number."""
    draw = random.Random(1)

    def chat() -> list[dict[str, str]]:
        words = draw.choices(WORDS, k=draw.randint(8, 20))
        return [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": draw.choice(WORDS)},
        ]

    rows = round(tokens * 1000 / sum(tokens_of(chat()) for _ in range(1000)))
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"messages": chat()}) + "\n" for _ in range(rows))
    return rows


def run_stage(flags: list[str]) -> None:
    """Run the stage in this process and print the peak at the end of each phase."""
    from pipeline.teacher import prepare as preparing
    from pipeline.teacher.capture import run as capture
    from stages.cache_teacher import main as stage_one

    peaks: list[int] = []

    def noting(function: Any, *, before: bool) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if before:
                peaks.append(peak_rss_bytes())
            result = function(*args, **options)
            if not before:
                peaks.append(peak_rss_bytes())
            return result

        return call

    preparing.prepare = noting(preparing.prepare, before=False)
    capture.finalize = noting(capture.finalize, before=True)
    if code := stage_one(flags):
        sys.exit(code)
    print(json.dumps([*peaks, peak_rss_bytes()]))


def hold_objects(flags: list[str]) -> None:
    """Prepare the stage and hold all samples in a list, as the baseline."""
    from pipeline.config import parse_command
    from pipeline.teacher.prepare import prepare
    from stages.settings import TeacherRun

    run: Any = parse_command(TeacherRun, flags, prog="", description="").settings
    prepared = prepare(run.teacher, run.corpus, run.capture, seed=run.seed)
    held = list(prepared.capture.corpus.samples)
    print(json.dumps([peak_rss_bytes()] * (1 + bool(held))))


def apart(kind: str, flags: list[str]) -> list[int]:
    """Return the peaks that a fresh process printed."""
    command = [sys.executable, "-m", "tests.bench.memory", f"--{kind}", json.dumps(flags)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [int(peak) for peak in json.loads(done.stdout.splitlines()[-1])]


def flags_of(teacher: Path, corpus: Path, cache: Path) -> list[str]:
    """Return the flags of one run."""
    return [
        "--teacher_model", str(teacher), "--teacher.engine", "transformers",
        "--teacher.batch_tokens", "4096", "--dataset_name", str(corpus), "--max_length", "64",
        "--capture.top_k", "4", "--capture.temperatures", "1.0",
        "--capture.shard_tokens", str(SHARD_TOKENS), "--cache_dir", str(cache),
        "--log_level", "warning",
    ]  # fmt: skip


def measure(root: Path) -> float:
    """Run all, print the table and return the ratio of the two peaks."""
    from tests.tiny import make_teacher, make_tokenizer
    from tests.tiny import write_corpus as tiny_corpus

    tokenizer = make_tokenizer(tiny_corpus(root / "words"))
    teacher = make_teacher(root / "teacher", tokenizer, layers=1)

    def tokens_of(messages: Any) -> int:
        return len(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])

    rows: list[tuple[str, int, list[int], float]] = []
    for shards in (FEW, MANY):
        corpus = root / f"{shards}.jsonl"
        samples = write_corpus(corpus, tokens=shards * SHARD_TOKENS, tokens_of=tokens_of)
        flags = flags_of(teacher, corpus, root / f"cache-{shards}")
        before = cpu_seconds()
        peaks = apart("stage", flags)
        rows.append((f"{shards} shards", samples, peaks, cpu_seconds() - before))
        made = len(list((root / f"cache-{shards}" / "data").rglob("*.parquet")))
        # The held-out rows of the small corpus are a small shard of their own.
        assert abs(made - shards) <= max(2, shards // 100), f"{made} shards, not {shards}"
    (_, _, few, _), (_, samples, many, _) = rows
    # The teacher's memory is added to the corpus's in both cases.
    held = few[-1] + apart("objects", flags)[0] - many[0]
    print(f"{'':<28}{'samples':>9}{'peak MB':>9}{'ratio':>8}  MB by the end of {', '.join(PHASES)}")
    for name, samples, peaks, seconds in rows:
        line(name, samples, peaks[-1], few[-1])
        phases = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        print(f"  {phases}  ({seconds:.0f} s of CPU)")
    line("1000 held as objects", samples, held, few[-1])
    print()
    return many[-1] / few[-1]


def line(name: str, samples: int, peak: int, baseline: int) -> None:
    """Print the start of a line of the table."""
    print(f"{name:<28}{samples:>9}{peak / 1e6:>9.0f}{peak / baseline:>8.3f}", end="")


def cpu_seconds() -> float:
    """CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--objects", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(json.loads(arguments.stage))
    elif arguments.objects:
        hold_objects(json.loads(arguments.objects))
    else:
        with TemporaryDirectory() as scratch:
            ratio = measure(Path(scratch))
        print(f"FIGURE writer_peak_memory_ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
