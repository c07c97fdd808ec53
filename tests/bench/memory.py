"""Peak memory of stage one against the size of the corpus: 10 shards and 1,000 of the same size.

`python -m tests.bench.memory` runs the real stage with a tiny teacher, each corpus in a separate
process, and compares the largest resident sets (VmHWM) of the worker and of the process that
tokenises for it. Units of the corpus have one size as well, a few shards each. The last line is the
baseline in which the samples of the large corpus are held as Python objects.
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
UNIT_MIB = 0.07
"""The text of three shards; of 1,000, the summaries of the first 256 units are folded."""
WORDS = [
    "open", "file", "read", "line", "list", "key", "name", "value", "function", "error", "module",
    "path", "setting", "data",
]  # fmt: skip
PHASES = ("the first unit", "the shards", "the manifest")


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
    """Run the stage in this process; print its peak by the end of each phase, and its process's."""
    from pipeline.teacher.capture import run as capture
    from pipeline.teacher.preparation.processes import UnitProcesses
    from pipeline.teacher.preparation.work import Preparation
    from stages.cache_teacher import main as stage_one

    peaks: list[int] = []
    tokenising: list[int] = []
    wait_until, finalize, close = (
        Preparation.wait_until,
        vars(capture)["finalize"],
        UnitProcesses.close,
    )

    def first_unit(*args: Any) -> None:
        wait_until(*args)
        peaks.append(peak_rss_bytes())

    def end(*args: Any, **options: Any) -> Any:
        peaks.append(peak_rss_bytes())
        return finalize(*args, **options)

    def close_all(self: UnitProcesses) -> None:
        # At the latest moment: they are killed next.
        processes = self._pool._processes or {}
        tokenising.extend(peak_of(process) for process in processes)
        close(self)

    Preparation.wait_until = first_unit  # type: ignore[method-assign, assignment]
    vars(capture)["finalize"] = end
    UnitProcesses.close = close_all  # type: ignore[method-assign]
    if code := stage_one(flags):
        sys.exit(code)
    print(json.dumps([*peaks, peak_rss_bytes(), max(tokenising)]))


def peak_of(process: int) -> int:
    """Return the largest resident set of another process."""
    fields = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in fields if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def hold_objects(flags: list[str]) -> None:
    """Read all samples of the corpus one shard after the other, then hold them, as the baseline."""
    from pipeline.api.settings import TeacherRun
    from pipeline.config import parse_command
    from pipeline.observe.shares import Shares
    from pipeline.teacher.prepare import prepare

    run: Any = parse_command(TeacherRun, flags, prog="", description="").settings
    prepared = prepare(run.teacher, run.corpus, run.capture, seed=run.seed, cache_url=run.cache_dir)
    assert prepared.corpus is not None
    with prepared.corpus.preparing(lease_s=60, shares=Shares()) as preparation:
        preparation.wait()
    source = prepared.capture.source
    source.refresh()
    shards = [len(shard.samples) for shard in source.shards]
    read = peak_rss_bytes()
    held = [sample for shard in source.shards for sample in shard.samples]
    assert len(held) == sum(shards)
    print(json.dumps([read, peak_rss_bytes()]))


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
        "--capture.shard_tokens", str(SHARD_TOKENS), "--corpus.unit_mib", str(UNIT_MIB),
        "--corpus.processes", "1", "--cache_dir", str(cache),
        "--log_level", "warning",
    ]  # fmt: skip


def measure(root: Path, few_shards: int, many_shards: int) -> tuple[float, float]:
    """Run all, print the table and return the ratio of the peaks: worker, tokenising process."""
    from tests.tiny import make_teacher, make_tokenizer
    from tests.tiny import write_corpus as tiny_corpus

    tokenizer = make_tokenizer(tiny_corpus(root / "words"))
    teacher = make_teacher(root / "teacher", tokenizer, layers=1)

    def tokens_of(messages: Any) -> int:
        return len(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])

    rows: list[tuple[str, int, list[int], float]] = []
    for shards in (few_shards, many_shards):
        corpus = root / f"{shards}.jsonl"
        samples = write_corpus(corpus, tokens=shards * SHARD_TOKENS, tokens_of=tokens_of)
        flags = flags_of(teacher, corpus, root / f"cache-{shards}")
        before = cpu_seconds()
        peaks = apart("stage", flags)
        rows.append((f"{shards} shards", samples, peaks, cpu_seconds() - before))
        made = len(list((root / f"cache-{shards}" / "data").rglob("*.parquet")))
        # The held-out rows of the small corpus are a small shard of their own.
        assert abs(made - shards) <= max(2, shards // 10), f"{made} shards, not {shards}"
    (_, _, few, _), (_, samples, many, _) = rows
    read, held = apart("objects", flags)
    print(f"{'':<28}{'samples':>9}{'peak MB':>9}{'ratio':>8}  MB by the end of {', '.join(PHASES)}")
    for name, count, peaks, seconds in rows:
        line(name, count, max(peaks[:-1]), max(few[:-1]))
        phases = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks[:-1])
        print(f"  {phases}  ({seconds:.0f} s of CPU)")
    for name, count, peaks, _ in rows:
        line(f"{name}, tokenising", count, peaks[-1], few[-1])
        print()
    # What the objects add to reading alone is added to the peak of the small corpus.
    line(f"{many_shards} held as objects", samples, max(few[:-1]) + held - read, max(few[:-1]))
    print()
    return max(many[:-1]) / max(few[:-1]), many[-1] / few[-1]


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
    parser.add_argument("--shards", type=int, nargs=2, default=(FEW, MANY))
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(json.loads(arguments.stage))
    elif arguments.objects:
        hold_objects(json.loads(arguments.objects))
    else:
        with TemporaryDirectory() as scratch:
            worker, tokenising = measure(Path(scratch), *arguments.shards)
        print(f"FIGURE writer_peak_memory_ratio {worker:.3f}")
        print(f"FIGURE tokenising_peak_memory_ratio {tokenising:.3f}")


if __name__ == "__main__":
    main()
