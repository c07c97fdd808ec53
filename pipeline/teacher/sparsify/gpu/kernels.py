# ruff: noqa: ANN001, ANN201, ANN202, RUF005
# mypy: disable-error-code="assignment"
"""The reduction's Triton kernels: one program a row, which it reads in blocks.

`statistics_kernel` reads a row once: running maximum, and the sums of the exponentials at every
temperature (online softmax, Milakov and Gimelshein 2018). For top-k it also finds a border that at
least k entries reach and few more: entries fall into BLOCK groups by their id modulo BLOCK, and the
k-th largest of the groups' maxima is such a number. `candidates_kernel` collects what reaches it;
of a top-1, the maximum and its place are all there is to know.
`draw_kernel` reads the row a second time for an inclusion rule: rounding with the row's dither,
integer steps, their running sum, and the entries that it carries past a mark.

Floating-point numbers are ordered by their bits as integers, ties by the smaller id, so every
selection has one result. All decisions after the steps are of integers.

Legend: [R, S] `row_ptr` holds a row's maximum and log of its sum; [R, C] `columns_ptr` is what
`sparsify` returns. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["candidates_kernel", "draw_kernel", "statistics_kernel", "top_kernel"]

_TO_EVEN = tl.constexpr(12582912.0)
"""1.5 x 2^23: added and taken away it rounds a float32 below 2^22 to the nearest whole, as
torch.round does."""


@triton.jit
def _whole(x):
    return (x + _TO_EVEN) - _TO_EVEN


@triton.jit
def _ordered(x):
    """Return integers in the order of the numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(order):
    """Return what `_ordered` was given."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _read(logits_ptr, at, vocab):
    """Return a block of a row as float32; past its end, minus infinity."""
    return tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def statistics_kernel(
    logits_ptr, label_ptr, columns_ptr, row_ptr, border_ptr, stride, columns_stride, vocab,
    temperatures, exponents, log_z_step,
    COUNT: tl.constexpr, GRID: tl.constexpr, ONE: tl.constexpr, ROUNDED: tl.constexpr,
    TOP: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write label, log Z and entropies; GRID of COUNT temperatures have columns, ONE is T = 1.

    `border_ptr` gets the order of the border; of a TOP of 1 the largest entry's key.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    of_group = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = (zero,) * COUNT
    weighted = (zero,) * COUNT
    largest = tl.full([], LOWEST, tl.float32)
    place = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + lane
        x = _read(logits_ptr, at, vocab)
        if TOP > 1:
            of_group = tl.maximum(of_group, x)
        of_block = tl.max(x, axis=0)
        if of_block > largest:  # rare after the first blocks
            change = largest - of_block
            sums_after = ()
            weighted_after = ()
            for g in tl.static_range(COUNT):
                factor = tl.exp2(change * exponents[g])
                weighted_after = weighted_after + ((weighted[g] + change * sums[g]) * factor,)
                sums_after = sums_after + (sums[g] * factor,)
            sums = sums_after
            weighted = weighted_after
            largest = of_block
            if TOP == 1:
                place = tl.min(tl.where(x == of_block, at, 0x7FFFFFFF), axis=0)
        below = tl.where(at < vocab, x - largest, LOWEST)
        sums_after = ()
        weighted_after = ()
        for g in tl.static_range(COUNT):
            e = tl.exp2(below * exponents[g])
            sums_after = sums_after + (sums[g] + e,)
            weighted_after = weighted_after + (weighted[g] + e * below,)
        sums = sums_after
        weighted = weighted_after
    log_z = tl.log(tl.sum(sums[ONE], axis=0))
    columns_ptr += row * columns_stride
    for g in tl.static_range(GRID):
        total = tl.sum(sums[g], axis=0)
        log_total = tl.log(total)
        normaliser = log_total - log_z / temperatures[g]
        if ROUNDED:
            normaliser = _whole(normaliser / log_z_step) * log_z_step
        entropy = log_total - tl.sum(weighted[g], axis=0) / (total * temperatures[g])
        tl.store(columns_ptr + 2 + g, normaliser)
        tl.store(columns_ptr + 2 + GRID + g, entropy)
    x = tl.load(logits_ptr + tl.load(label_ptr + row)).to(tl.float32)
    tl.store(columns_ptr, (x - largest) - log_z)
    tl.store(row_ptr + 2 * row, largest)
    tl.store(row_ptr + 2 * row + 1, log_z)
    if TOP == 1:
        key = (_ordered(largest).to(tl.int64) << 32) | (0x7FFFFFFF - place)
        tl.store(border_ptr + row, key)
    if TOP > 1:
        order = _ordered(of_group)
        low = tl.full([], -(2**31), tl.int64)
        high = tl.full([], 2**31 - 1, tl.int64)
        for _ in range(32):
            middle = (low + high + 1) >> 1
            enough = tl.sum((order >= middle).to(tl.int32), axis=0) >= TOP
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        tl.store(border_ptr + row, low)


@triton.jit
def candidates_kernel(
    logits_ptr, border_ptr, keys_ptr, stride, vocab,
    TOP: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a key for every entry that reaches the border; of a full house, for the TOP largest.

    A key is the entry's place in the order above and 2^31 - 1 - id below: the larger, the earlier.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    keys_ptr += row * CAPACITY
    lane = tl.arange(0, BLOCK)
    border = tl.load(border_ptr + row)
    count = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + lane
        order = _ordered(_read(logits_ptr, at, vocab)).to(tl.int64)
        hit = (at < vocab) & (order >= border)
        here = tl.sum(hit.to(tl.int32), axis=0)
        if here > 0:
            place = count + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            key = (order << 32) | (0x7FFFFFFF - at)
            tl.store(keys_ptr + place, key, mask=hit & (place < CAPACITY))
            count += here
    if count > CAPACITY:  # many equal logits: bisect over the row itself
        low = border
        high = tl.full([], 2**31 - 1, tl.int64)
        for _ in range(32):
            middle = (low + high + 1) >> 1
            reached = tl.full([], 0, tl.int32)
            for start in range(0, vocab, BLOCK):
                at = start + lane
                order = _ordered(_read(logits_ptr, at, vocab)).to(tl.int64)
                reached += tl.sum(((at < vocab) & (order >= middle)).to(tl.int32), axis=0)
            low = tl.where(reached >= TOP, middle, low)
            high = tl.where(reached >= TOP, high, middle - 1)
        above = tl.full([], 0, tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + lane
            order = _ordered(_read(logits_ptr, at, vocab)).to(tl.int64)
            above += tl.sum(((at < vocab) & (order > low)).to(tl.int32), axis=0)
        equals_left = TOP - above
        count = tl.full([], 0, tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + lane
            order = _ordered(_read(logits_ptr, at, vocab)).to(tl.int64)
            equal = (at < vocab) & (order == low)
            taken = equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= equals_left)
            hit = taken | ((at < vocab) & (order > low))
            place = count + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            key = (order << 32) | (0x7FFFFFFF - at)
            tl.store(keys_ptr + place, key, mask=hit)
            count += tl.sum(hit.to(tl.int32), axis=0)
            equals_left -= tl.sum(taken.to(tl.int32), axis=0)
        # The first collection may have filled the places behind.
        behind = tl.arange(0, CAPACITY)
        nothing = tl.full([CAPACITY], -(2**63), tl.int64)
        tl.store(keys_ptr + behind, nothing, mask=behind >= count)


@triton.jit
def top_kernel(
    keys_ptr, row_ptr, columns_ptr, columns_stride,
    GRID: tl.constexpr, TOP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write ids, log p and the mass outside of the TOP largest, from their keys in order."""
    row = tl.program_id(0).to(tl.int64)
    columns_ptr += row * columns_stride
    place = tl.arange(0, PADDED)
    inside = place < TOP
    key = tl.load(keys_ptr + row * TOP + place, mask=inside, other=0)
    x = _number((key >> 32).to(tl.int32))
    log_p = (x - tl.load(row_ptr + 2 * row)) - tl.load(row_ptr + 2 * row + 1)
    mass = tl.sum(tl.where(inside, tl.exp(log_p), 0.0), axis=0)
    tl.store(columns_ptr + 1, tl.minimum(tl.maximum(1.0 - mass, 0.0), 1.0))
    ids = (0x7FFFFFFF - (key & 0xFFFFFFFF)).to(tl.float32)
    first = 2 + 2 * GRID
    tl.store(columns_ptr + first + place, ids, mask=inside)
    tl.store(columns_ptr + first + TOP + place, log_p, mask=inside)


@triton.jit
def _ratio(log_p, inverses, shifts, factors, USED: tl.constexpr, BOTH: tl.constexpr):
    """Return `InclusionRule.ratio`; BOTH: of the temperatures 1 and 2."""
    if BOTH:
        half = tl.exp(log_p * 0.5)
        ratio = half * tl.sqrt(half * half * factors[0] + factors[1])
    else:
        ratio = tl.exp(tl.maximum(log_p * inverses[0] - shifts[0], -40.0))
        if USED > 1:
            total = ratio * ratio
            for g in tl.static_range(1, USED):
                other = tl.exp(tl.maximum(log_p * inverses[g] - shifts[g], -40.0))
                total += other * other
            ratio = tl.sqrt(total)
    return ratio


@triton.jit
def draw_kernel(
    logits_ptr, label_ptr, noise_ptr, last_ptr, row_ptr, columns_ptr, stride, columns_stride, vocab,
    temperatures, inverses, log_taus, tau_factors, places, step, inverse_step, most,
    GRID: tl.constexpr, USED: tl.constexpr, BOTH: tl.constexpr, TOP: tl.constexpr,
    ALWAYS: tl.constexpr, SAMPLED: tl.constexpr, BITS: tl.constexpr, PADDED: tl.constexpr,
    FARTHEST: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ids and log p of ALWAYS always-kept and SAMPLED sampled places, and the mass outside.

    A mark stands at every 2^BITS steps from the row's offset on. `last_ptr` holds the key of the
    last of the TOP largest, `places` says which normaliser is whose of USED temperatures.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    columns_ptr += row * columns_stride
    lane = tl.arange(0, BLOCK)
    largest = tl.load(row_ptr + 2 * row)
    log_z = tl.load(row_ptr + 2 * row + 1)
    label = tl.load(label_ptr + row)
    label_log_p = tl.load(columns_ptr)
    noise = tl.load(noise_ptr + row)
    dither = (noise & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08 - 0.5
    first = (((noise >> 24) << BITS) >> 30).to(tl.int32)
    shifts = ()
    factors = (tau_factors[0],)
    near = tl.full([], -LOWEST, tl.float32)  # no log p below it is kept always
    for g in tl.static_range(USED):
        normaliser = tl.load(columns_ptr + 2 + places[g])
        shift = normaliser + log_taus[g]
        shifts = shifts + (shift,)
        near = tl.minimum(near, (shift - 1.0) * temperatures[g])
        if g == 1:
            factors = factors + (tl.exp(-2.0 * normaliser) * tau_factors[1],)
    if TOP > 0:
        last = tl.load(last_ptr + row)
        near = tl.minimum(near, (_number((last >> 32).to(tl.int32)) - largest) - log_z)
    at_ids = columns_ptr + 2 + 2 * GRID
    at_values = at_ids + ALWAYS + SAMPLED
    nan_or_0 = label_log_p * 0.0
    scale: tl.constexpr = 1 << BITS
    kept = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float32)
    running = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + lane
        x = _read(logits_ptr, at, vocab)
        log_p = (x - largest) - log_z
        on_grid = _whole(tl.maximum(log_p, FARTHEST) * inverse_step + dither)
        on_grid = (on_grid - dither) * step
        pi = _ratio(on_grid, inverses, shifts, factors, USED, BOTH)
        pi = tl.minimum(pi * (scale * 1.0) + 0.5, most)
        eligible = (at < vocab) & (at != label)
        steps = tl.where(eligible & (pi == pi), pi, 0.0).to(tl.int32)
        if tl.max(log_p, axis=0) >= near:
            always = _ratio(log_p, inverses, shifts, factors, USED, BOTH) >= 1.0
            if TOP > 0:
                key = (_ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - at)
                always = always | (key >= last)
            always = always & eligible
            place = kept + tl.cumsum(always.to(tl.int32), axis=0) - 1
            always = always & (place < ALWAYS)
            tl.store(at_ids + place, at.to(tl.float32), mask=always)
            tl.store(at_values + place, log_p + nan_or_0, mask=always)
            mass += tl.sum(tl.where(always, tl.exp(log_p), 0.0), axis=0)
            kept += tl.sum(always.to(tl.int32), axis=0)
            steps = tl.where(always, 0, steps)
        # The number of marks below a sum s is that of whole m with first + m scale < s.
        after = running + tl.sum(steps, axis=0)
        if ((after - first + scale - 1) >> BITS) > ((running - first + scale - 1) >> BITS):
            upto = running + tl.cumsum(steps, axis=0)
            mark = (upto - steps - first + scale - 1) >> BITS
            sampled = (((upto - first + scale - 1) >> BITS) > mark) & (mark < SAMPLED)
            tl.store(at_ids + ALWAYS + mark, at.to(tl.float32), mask=sampled)
            tl.store(at_values + ALWAYS + mark, on_grid + nan_or_0, mask=sampled)
        running = after
    marks = (running - first + scale - 1) >> BITS
    place = tl.arange(0, PADDED)
    nothing = tl.zeros([PADDED], tl.float32)
    empty = (place >= kept) & (place < ALWAYS)
    tl.store(at_ids + place, nothing - 1.0, mask=empty)
    tl.store(at_values + place, nothing + nan_or_0, mask=empty)
    empty = (place >= marks) & (place < SAMPLED)
    tl.store(at_ids + ALWAYS + place, nothing - 1.0, mask=empty)
    tl.store(at_values + ALWAYS + place, nothing + nan_or_0, mask=empty)
    outside = 1.0 - mass - tl.exp(label_log_p)
    tl.store(columns_ptr + 1, tl.minimum(tl.maximum(outside, 0.0), 1.0))
