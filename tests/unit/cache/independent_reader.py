"""An independent reader of rows, from FORMAT.md alone: nothing of `pipeline` is used here."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import zstandard

__all__ = ["dither_of", "order_of", "read_row"]


def order_of(table: Any) -> list[int]:
    """Return the token of each rank."""
    frame = base64.b64decode(table.schema.metadata[b"distill_ranks"])
    classes = zstandard.ZstdDecompressor().decompress(frame)
    return sorted(range(len(classes)), key=lambda token: (-classes[token], token))


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def next(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def half(self) -> int:
        self.at += 1
        return self.data[(self.at - 1) // 2] >> 4 * ((self.at - 1) % 2) & 15


def _number(stream: _Stream) -> int:
    """Seven bits a byte, the lowest first, the top bit set where another byte follows."""
    number = shift = 0
    while True:
        byte = stream.next()
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.number, self.at, self.end = int.from_bytes(data, "little"), 0, 8 * len(data)

    def take(self, count: int) -> int:
        value = self.number >> self.at & (1 << count) - 1
        self.at += count
        assert self.at <= self.end
        return value


def dither_of(sample_id: str, r: int) -> float:
    x = ((r + 1) * 0x9E3779B97F4A7C15 + int(sample_id[:16], 16)) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return (x >> 10) % 2**24 / 2**24 - 0.5


def _runs(row: dict[str, bytes], kind: str, order: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Take counts by `send`, yield runs of (token, code)."""
    ids = [_Stream(row[f"{kind}_ids_{stream}"]) for stream in range(4)]
    bits = _Bits(row[f"{kind}_bits"])
    always_kept = kind != "sampled"
    names = (
        [f"{kind}_values"] if always_kept else [f"sampled_values_{stream}" for stream in range(3)]
    )
    values = [_Stream(row[name]) for name in names]
    run: list[tuple[int, int]] = []
    while True:
        count = yield run
        if count is None:
            break
        before, run = -1, []
        for left in range(count, 0, -1):
            stream = 2 * (before >= 62) + (left == 1)
            c = ids[stream].next()
            before += (1 << c) + bits.take(c)
            if always_kept:
                code = values[0].next()
            else:
                code = values[before >= 1023].half()
                if code == 15:
                    code = values[2].next()
            run.append((order[before], code))
    assert all(stream.at == len(stream.data) for stream in ids)
    assert 0 <= bits.end - bits.at < 8
    if always_kept:
        assert values[0].at == len(values[0].data)
    else:
        assert [(v.at + 1) // 2 for v in values[:2]] == [len(v.data) for v in values[:2]]
        assert values[2].at == len(values[2].data)
    yield []


def read_row(
    row: dict[str, Any], codec: dict[str, Any], grid: list[float], order: list[int]
) -> dict[str, Any]:
    quantisation, rule = codec["quantisation"], codec["inclusion_rule"]
    a, b, s = (
        quantisation["always_kept_scale"],
        quantisation["always_kept_step"],
        quantisation["sampled_step"],
    )
    code_p = [-a * (math.exp(b * k) - 1) for k in range(256)]
    mass = [math.floor(65536 * math.exp(v) + 0.5) for v in code_p]
    places = [i for i, loss_mask in enumerate(row["loss_mask"]) if loss_mask]
    number, others = len(places), [t for t in grid if t != 1.0]
    dither = [dither_of(row["sample_id"], i - 1) for i in places]
    high = row["counts_high"] or bytes(2 * number)
    log_z, entropy = [], []
    for n in range(number):
        values = {1.0: 0.0}
        for g, t in enumerate(others):
            low, top = row["log_z"][g * number + n], row["log_z_high"][g * number + n]
            step = low | top << 8
            values[t] = quantisation["log_z_step"] * (step - 65536 * (step >= 32768))
        log_z.append([values[t] for t in grid])
        entropy.append([
            quantisation["entropy_step"] * (row["entropy"][g * number + n] + dither[n])
            for g in range(len(grid))
        ])  # fmt: skip
    used = [] if rule is None else [g for g, tau in enumerate(rule["taus"]) if tau > 0]
    alone = rule is not None and [grid[g] for g in used] == [1.0]
    always_kept = _runs(row, "always_kept", order)
    sampled = _runs(row, "sampled", order)
    next(always_kept), next(sampled)
    requests = codec.get("requested_entries", False)
    requested = _runs(row, "requested", order) if requests else None
    if requested is not None:
        next(requested)
    choices = _Stream(row["largest"]) if codec.get("largest_known") else None
    largest: list[int] = []
    code_r = [-0.05 * (math.exp(0.028 * k) - 1) for k in range(256)]
    counts, ids, logprobs, inclusion = [], [], [], []
    for n, place in enumerate(places):
        own = always_kept.send(row["always_kept_counts"][n] | high[n] << 8)  # type: ignore[attr-defined]
        u = row["sampled_counts"][n] | high[number + n] << 8
        label = row["label_logprob"][n]
        if alone:
            t = max(1, math.floor(65536 * rule["taus"][grid.index(1.0)] + 0.5))
            rest = max(0, 65536 - mass[label] - sum(mass[k] for _, k in own))
            u = (rest + t // 2) // t + (u // 2 if u % 2 == 0 else -(u + 1) // 2)
        far = sampled.send(u)  # type: ignore[attr-defined]
        if choices is not None:
            first_of_all = [] if rule is None else [(row["input_ids"][place], label)]
            candidates = [*first_of_all, *sorted(own)]
            lowest = min((k for _, k in candidates), default=0)
            candidates = [token for token, k in candidates if k == lowest]
            chosen = _number(choices) if len(candidates) > 1 else 0
            largest.append(candidates[chosen] if candidates else -1)
        found: list[tuple[int, float, float]] = []
        if rule is not None:
            found.append((row["input_ids"][place], code_p[label], 1.0))
        found += [(token, code_p[k], 1.0) for token, k in sorted(own)]
        for token, k in sorted(far):
            log_p = -s * (k + dither[n])
            total = sum(
                (math.exp(log_p / grid[g] - log_z[n][g]) / rule["taus"][g]) ** 2 for g in used
            )
            found.append((token, log_p, min(1 - 2**-20, math.sqrt(total))))
        if rule is None and found:
            p = [math.exp(value) for _, value, _ in found]
            codes = [k for _, k in sorted(own)]
            m = codes.index(min(codes))
            tail = row["tail"][n]
            rest = 1 - (0.0 if tail == 255 else math.exp(-quantisation["tail_step"] * tail))
            rest -= sum(p[:m] + p[m + 1 :])
            bounded = min(max(rest, p[m] * math.exp(-b)), min(p[m] * math.exp(b), 1.0))
            found[m] = (found[m][0], math.log(bounded), 1.0)
        if requested is not None:
            run = requested.send(row["requested_counts"][n])  # type: ignore[attr-defined]
            asked = {token: code_r[k] for token, k in run}
            first = [] if rule is None else found[:1]
            kept = {token: value for token, value, pi in found[len(first) :] if pi == 1}
            kept = {**asked, **kept} if rule is None else {**kept, **asked}
            rest_of = [entry for entry in found[len(first) :] if entry[2] < 1]
            found = [*first, *((token, value, 1.0) for token, value in sorted(kept.items()))]
            found += [entry for entry in rest_of if entry[0] not in asked]
        counts.append(len(found))
        ids += [token for token, _, _ in found]
        logprobs += [value for _, value, _ in found]
        inclusion += [pi for _, _, pi in found]
    always_kept.send(None), sampled.send(None)  # type: ignore[attr-defined]
    if requested is not None:
        requested.send(None)  # type: ignore[attr-defined]
    assert choices is None or choices.at == len(choices.data)
    written = []
    if codec.get("written_logprobs"):
        low, top = row["written_logprob"], row["written_logprob_high"]
        assert len(low) == len(top) == number
        written = [-(one | other << 8) / 1024 for one, other in zip(low, top, strict=True)]
    return {
        "counts": counts, "token_ids": ids, "logprobs": logprobs, "inclusion": inclusion,
        "log_z": log_z, "entropy": entropy,
        "label_logprob": [code_p[k] for k in row["label_logprob"]], "written": written,
        "largest": largest,
    }  # fmt: skip
