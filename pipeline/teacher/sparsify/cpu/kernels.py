# mypy: disable-error-code="assignment,no-any-return"
"""Loops over a row of logits, compiled by numba: sums, the largest entries, and the draw.

torch needs a pass over the row for each operation, about 25; here the logits are read twice, three
times where entries are sampled. All in one file, because numba compiles again where the file of a
kernel has changed, not that of a function that it calls.

Legend: V vocabulary, M groups of entries, G temperatures, N entries that are looked at, K kept and
D sampled ones, B blocks of entries, Q codes of sampled values.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.jit import inlined, kernel, reordered

__all__ = ["reduce_rows"]

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]
_Ints = NDArray[np.int32]

_LOWEST_EXPONENT = np.float32(-87.0)
"""exp of what is lower is not a normal number of float32, and counts as 0."""
_LOG2_E = np.float32(1.44269504088896341)
_LOG_2_HIGH, _LOG_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P = tuple(np.array([1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                     1.6666665459e-1, 5.0000001201e-1], np.float32))  # fmt: skip
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)
_SIGN, _NOT_SIGN = np.int32(31), np.int32(0x7FFFFFFF)
_SUMMED = 1024
"""Entries that are added up in float32, before their sum is added in float64."""
_BLOCK = 64
"""Entries whose steps are added up before the draw looks for its marks among them."""


@inlined
def _exp(x: np.float32) -> np.float32:
    """Return e^x of a number from `_LOWEST_EXPONENT` to 88, with a relative error of 3e-7 at most.

    In operations that become vector instructions: the C library's, called for each number, takes
    nine times as long. Polynomial and the parts of log 2 as in the Cephes library (Moshier, expf).
    """
    power = np.floor(x * _LOG2_E + _HALF)
    rest = x - power * _LOG_2_HIGH - power * _LOG_2_LOW
    y = ((((_P[0] * rest + _P[1]) * rest + _P[2]) * rest + _P[3]) * rest + _P[4]) * rest + _P[5]
    y = y * rest * rest + rest + _ONE
    scale = np.int32((np.int32(power) + _BIAS) << _MANTISSA)
    return y * scale.view(np.float32)


@reordered
def sums_at(z_V: _Floats, largest: np.float32, inverse: np.float32) -> tuple[float, float]:
    """Return sum exp(x / T) and sum x exp(x / T) of x = z - largest; `inverse` is 1 / T.

    Not finite where a logit is not. Summed in an order that depends on the processor alone.
    """
    total, weighted = 0.0, 0.0
    for start in range(0, z_V.size, _SUMMED):
        part, part_w = _ZERO, _ZERO
        for v in range(start, min(start + _SUMMED, z_V.size)):
            x = z_V[v] - largest
            y = x * inverse
            e = _exp(max(y, _LOWEST_EXPONENT))
            e = e if y > _LOWEST_EXPONENT else _ZERO
            part += e
            part_w += e * x
        total += part
        weighted += part_w
    return total, weighted


@reordered
def sums_at_both(z_V: _Floats, largest: np.float32) -> tuple[float, float, float, float]:
    """Return the sums of `sums_at` at T = 1, then at T = 2, of one exponential."""
    total_1, weighted_1, total_2, weighted_2 = 0.0, 0.0, 0.0, 0.0
    for start in range(0, z_V.size, _SUMMED):
        part_1, part_w1, part_2, part_w2 = _ZERO, _ZERO, _ZERO, _ZERO
        for v in range(start, min(start + _SUMMED, z_V.size)):
            x = z_V[v] - largest
            e_2 = _exp(max(x, _LOWEST_EXPONENT) * _HALF)
            # What is left out is below exp(-87) at T = 1 and exp(-43) at T = 2, of sums above 1.
            e_2 = e_2 if x > _LOWEST_EXPONENT else _ZERO
            e_1 = e_2 * e_2
            part_1 += e_1
            part_w1 += e_1 * x
            part_2 += e_2
            part_w2 += e_2 * x
        total_1 += part_1
        weighted_1 += part_w1
        total_2 += part_2
        weighted_2 += part_w2
    return total_1, weighted_1, total_2, weighted_2


@kernel
def group_maxima(z_V: _Floats, maxima_M: _Floats) -> np.float32:
    """Write the maxima of the entries m, m + M, m + 2 M, ...; return the row's largest.

    V // M entries each; the rest of the row, its end, belongs to no group.
    """
    groups = maxima_M.size
    width = z_V.size // groups
    maxima_M[:] = z_V[:groups]
    for line in range(1, width):
        for m in range(groups):
            value = z_V[line * groups + m]
            maxima_M[m] = value if value > maxima_M[m] else maxima_M[m]
    largest = maxima_M[0]
    for m in range(groups):
        largest = max(largest, maxima_M[m])
    for v in range(width * groups, z_V.size):
        largest = max(largest, z_V[v])
    return largest


@inlined
def _ascending(value: np.float32) -> np.int32:
    """Return a whole number that grows with a float's value; both zeros have the same."""
    bits = np.float32(value + _ZERO).view(np.int32)
    return bits ^ ((bits >> _SIGN) & _NOT_SIGN)


@kernel
def largest_entries(z_V: _Floats, maxima_M: _Floats, ids_K: NDArray[np.int64]) -> None:
    """Write the ids of the K largest entries, from the largest on; of equal ones by id.

    The K-th largest of the groups' maxima is a border that at least K entries reach, and hardly
    more where there are several groups for each. Finite logits; K at most V.
    """
    groups, most = maxima_M.size, ids_K.size
    width = z_V.size // groups
    if most == 0:
        return
    border = np.float32(-np.inf)
    if most <= groups:
        border = _largest_but(maxima_M, most)
    chosen_M = np.empty(groups, np.int32)
    chosen = 0
    for m in range(groups):
        if maxima_M[m] >= border:
            chosen_M[chosen] = m
            chosen += 1
    keys_N = np.empty(chosen * width + z_V.size - groups * width, np.int64)
    found = 0
    for line in range(width):  # by id, so that equal entries are in order already
        for place in range(chosen):
            v = line * groups + chosen_M[place]
            if z_V[v] >= border:
                keys_N[found] = (np.int64(~_ascending(z_V[v])) << 32) | v
                found += 1
    for v in range(groups * width, z_V.size):
        if z_V[v] >= border:
            keys_N[found] = (np.int64(~_ascending(z_V[v])) << 32) | v
            found += 1
    _sort(keys_N[:found])
    for k in range(most):
        ids_K[k] = keys_N[k] & 0xFFFFFFFF


@kernel
def _largest_but(values_M: _Floats, most: int) -> np.float32:
    """Return the `most`-th largest value: the highest that so many reach, by bisection."""
    keys_M = np.empty(values_M.size, np.int32)
    for m in range(values_M.size):
        keys_M[m] = _ascending(values_M[m])
    low, high = np.int64(keys_M.min()), np.int64(keys_M.max())
    while low < high:
        middle = np.int32((low + high + 1) >> 1)
        reached = np.int32(0)
        for m in range(keys_M.size):
            reached += np.int32(keys_M[m] >= middle)
        if reached >= most:
            low = np.int64(middle)
        else:
            high = np.int64(middle) - 1
    found = np.int32(low)
    return np.int32(found ^ ((found >> _SIGN) & _NOT_SIGN)).view(np.float32)


@kernel
def _sort(keys_N: NDArray[np.int64]) -> None:
    """Sort some hundred keys in place (Shell 1959, Ciura's gaps): numba's takes 4 s to compile."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for n in range(gap, keys_N.size):
            key, place = keys_N[n], n
            while place >= gap and keys_N[place - gap] > key:
                keys_N[place] = keys_N[place - gap]
                place -= gap
            keys_N[place] = key


@inlined
def _ratio(log_p: float, temperatures_G: _Doubles, taus_G: _Doubles, log_z_G: _Doubles) -> float:
    """Return `InclusionRule.ratio`."""
    total = 0.0
    for g in range(taus_G.size):
        if taus_G[g] > 0:
            part = math.exp(log_p / temperatures_G[g] - log_z_G[g]) / taus_G[g]
            total += part * part
    return math.sqrt(total)


@kernel
def steps_of_codes(
    temperatures_G: _Doubles, taus_G: _Doubles, log_z_G: _Doubles, dither: np.float32,
    step: np.float32, bits: int, most: float, steps_Q: _Ints,
) -> None:  # fmt: skip
    """Write the inclusion probability of each value that a sampled entry's log p may have.

    By the rule that readers apply to the same value (`InclusionRule.ratio`), in float64.

    Args:
        temperatures_G: of the rule.
        taus_G: of the rule; 0 where it does not cover a temperature.
        log_z_G: as stored.
        dither: of the row; code k is the value -(k + dither) step.
        step: of the grid.
        bits: of a probability of 1.
        most: whole steps of the highest one.
        steps_Q: to write to; the last one is no value and has no step.
    """
    for code in range(steps_Q.size - 1):
        log_p = float((-np.float32(code) - dither) * step)
        ratio = _ratio(log_p, temperatures_G, taus_G, log_z_G)
        steps_Q[code] = np.int32(min(ratio * (1 << bits) + 0.5, most))
    steps_Q[-1] = 0


@kernel
def draw(
    z_V: _Floats, whole: np.float32, dither: np.float32, step: np.float32, steps_Q: _Ints,
    kept_K: NDArray[np.int64], first: int, distance: int, codes_V: _Ints, ids_D: _Floats,
    values_D: _Floats,
) -> None:  # fmt: skip
    """Sample systematically: marks of equal distance along the running sum of the steps.

    Args:
        z_V: logits.
        whole: the log of the sum of their exponentials.
        dither: of the row.
        step: of the grid of sampled values.
        steps_Q: of `steps_of_codes`; what is lower than its lowest value counts as that.
        kept_K: ids that are always kept, and not sampled.
        first: the first mark.
        distance: of the marks: more than the steps of any entry, so that none is drawn twice.
        codes_V: memory.
        ids_D: to write ids to, ascending; -1 where there is no further one.
        values_D: to write log p to, as it is stored; 0 where there is none.
    """
    inverse, lowest = _ONE / step, np.float32(steps_Q.size - 2)
    for v in range(z_V.size):
        code = np.floor((whole - z_V[v]) * inverse - dither + _HALF)
        codes_V[v] = np.int32(min(max(code, _ZERO), lowest))
    for k in range(kept_K.size):
        codes_V[kept_K[k]] = steps_Q.size - 1
    ids_D[:] = np.float32(-1.0)
    values_D[:] = _ZERO
    mark, before, place = np.int64(first), np.int64(0), 0
    for start in range(0, z_V.size, _BLOCK):
        stop = min(start + _BLOCK, z_V.size)
        part = np.int64(0)
        for v in range(start, stop):
            part += steps_Q[codes_V[v]]
        if mark >= before + part:
            before += part
            continue
        for v in range(start, stop):
            before += steps_Q[codes_V[v]]
            if mark < before and place < ids_D.size:
                ids_D[place] = v
                values_D[place] = (-np.float32(codes_V[v]) - dither) * step
                place += 1
                mark += distance


@kernel
def reduce_rows(
    logits_RV: NDArray[np.float32], label_R: NDArray[np.int64], noise_R: NDArray[np.int64],
    temperatures_G: _Doubles, taus_G: _Doubles, top_k: int, places: int, log_z_step: float,
    sampled_step: float, bits: int, most_steps: float, maxima_M: _Floats, steps_Q: _Ints,
    codes_V: _Ints, columns_RC: NDArray[np.float32],
) -> None:  # fmt: skip
    """Write the columns of `sparsify` for each row; NaN where a logit is not finite.

    Args:
        logits_RV: not changed.
        label_R: the token that follows each row.
        noise_R: of `noise.row_noise`.
        temperatures_G: of the grid.
        taus_G: of the inclusion rule; all 0: nothing is sampled.
        top_k: entries that are kept because they are the largest.
        places: K, at least `top_k`.
        log_z_step: of stored normalisers.
        sampled_step: of the grid of sampled values.
        bits: of an inclusion probability of 1.
        most_steps: of the highest one.
        maxima_M: memory; its size says how entries are grouped.
        steps_Q: memory, one more than there are codes.
        codes_V: memory.
        columns_RC: to write to.
    """
    grid, vocab, sampled = temperatures_G.size, logits_RV.shape[1], bool(taus_G.any())
    log_z_G, entropy_G = np.empty(grid), np.empty(grid)
    ids_K = np.empty(min(places, vocab), np.int64)
    kept_K = np.empty(ids_K.size + 1, np.int64)
    start, step = 2 + 2 * grid, np.float32(sampled_step)
    split = start + (columns_RC.shape[1] - start) // 2
    for row in range(logits_RV.shape[0]):
        z_V, columns_C, label = logits_RV[row], columns_RC[row], label_R[row]
        largest = group_maxima(z_V, maxima_M)
        log_sum = _normalise(z_V, largest, temperatures_G, log_z_G, entropy_G)
        if not math.isfinite(log_sum):
            columns_C[:] = np.nan
            continue
        if sampled:  # as they are stored, which the rule and its readers see
            for g in range(grid):
                log_z_G[g] = np.rint(log_z_G[g] / log_z_step) * log_z_step
        whole = largest + log_sum
        label_log_p = z_V[label] - whole
        largest_entries(z_V, maxima_M, ids_K)
        ids_C, values_C = columns_C[start:split], columns_C[split:]
        ids_C[:places] = -1.0
        values_C[:places] = 0.0
        mass, kept = 0.0, 0
        for k in range(ids_K.size):
            v = ids_K[k]
            log_p = z_V[v] - whole
            if sampled:
                if v == label:
                    continue
                if k >= top_k and _ratio(log_p, temperatures_G, taus_G, log_z_G) < 1:
                    continue
            ids_C[kept], values_C[kept] = v, log_p
            kept_K[kept] = v
            mass += math.exp(log_p)
            kept += 1
        if sampled:
            mass += math.exp(label_log_p)
            kept_K[kept] = label
            noise = noise_R[row]
            dither = np.float32(np.float64(noise & 0xFFFFFF) * 2.0**-24 - 0.5)
            steps_of_codes(temperatures_G, taus_G, log_z_G, dither, step, bits, most_steps, steps_Q)
            draw(
                z_V, np.float32(whole), dither, step, steps_Q, kept_K[: kept + 1],
                ((noise >> 24) << bits) >> 30, 1 << bits, codes_V, ids_C[places:],
                values_C[places:],
            )  # fmt: skip
        columns_C[0] = label_log_p
        columns_C[1] = min(max(1.0 - mass, 0.0), 1.0)
        columns_C[2 : 2 + grid] = log_z_G
        columns_C[2 + grid : start] = entropy_G


@kernel
def _normalise(
    z_V: _Floats, largest: np.float32, temperatures_G: _Doubles, log_z_G: _Doubles,
    entropy_G: _Doubles,
) -> float:  # fmt: skip
    """Write log Z and entropy of each temperature; return the log of the sum from the largest on.

    Not finite where one of the logits is not.
    """
    both = False
    for temperature in temperatures_G:
        both = both or temperature == 2.0
    total_2, weighted_2 = 1.0, 0.0
    if both:
        total_1, weighted_1, total_2, weighted_2 = sums_at_both(z_V, largest)
    else:
        total_1, weighted_1 = sums_at(z_V, largest, _ONE)
    if not (math.isfinite(total_1) and math.isfinite(weighted_1)):
        return math.nan
    log_sum = math.log(total_1)
    for g in range(temperatures_G.size):
        temperature = temperatures_G[g]
        if temperature == 1.0:
            total, weighted = total_1, weighted_1
        elif temperature == 2.0:
            total, weighted = total_2, weighted_2
        else:
            total, weighted = sums_at(z_V, largest, np.float32(1.0 / temperature))
        log_z_G[g] = math.log(total) - log_sum / temperature
        entropy_G[g] = math.log(total) - weighted / (total * temperature)
    return log_sum
