"""DistillKit's compressed log-probs, decoded: exact values, a fitted curve, residuals, ids.

Written anew from its published format (arcee-ai/DistillKit, `distillkit/compression`): the bytes of
a position hold the `exact_k` largest log-probs in `exact_dtype`, the coefficients of
`polynomial_terms` in `term_dtype`, and for each residual bin a scale and integers of `element_bits`
bits; ids are packed, most significant bit first. What is stored is compressed with loss.

Legend: M positions, K entries of each, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Compression"]

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_MEMBERS = {
    "d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype", "residual_bins",
    "delta_encoding", "error_diffusion", "normalize_t",
}  # fmt: skip
_Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Bin:
    dtype: str
    bits: int
    count: int

    @property
    def bytes(self) -> int:
        return _BYTES[self.dtype] + -(-self.bits * self.count // 8)


@dataclass(frozen=True, slots=True)
class Compression:
    """How the rows of one file were compressed."""

    vocab: int
    k: int
    exact: int
    exact_dtype: str
    terms: tuple[int | str, ...]
    term_dtype: str
    bins: tuple[_Bin, ...]
    delta: bool
    unit: bool
    """The curve's argument runs from 0 to 1, not by whole numbers."""

    @classmethod
    def read(cls, data: Any) -> Compression:
        """Read a `compression_config.yaml`, or the section of a training file.

        Raises:
            ValueError: it is none, with everything that is wrong.
        """
        if isinstance(data, Mapping):
            data = data.get("teacher", data)
            data = data.get("logprob_compressor", data) if isinstance(data, Mapping) else data
        if not isinstance(data, Mapping):
            raise ValueError("found no mapping, expected its compression_config.yaml")
        if "legacy_logit_compression" in data or "polynomial_degree" in data:
            raise ValueError("legacy compression of centred logits, which are no log-probs")
        wrong = [f"unknown member {name}" for name in data if name not in _MEMBERS]
        vocab, k, exact = (
            _whole(data, name, least, wrong) for name, least in (("d", 2), ("k", 1), ("exact_k", 0))
        )
        dtypes = [data.get("exact_dtype", "float32"), data.get("term_dtype", "float32")]
        terms = tuple(data.get("polynomial_terms") or ())
        wrong += [
            f"polynomial term {term!r}, expected a power, sqrt or exp"
            for term in terms
            if not (isinstance(term, int) or term in ("sqrt", "exp"))
        ]
        bins = []
        for place, item in enumerate(_listed(data, wrong)):
            told: list[str] = []
            bits = _whole(item, "element_bits", 1, told)
            bins.append(
                _Bin(str(item.get("scale_dtype")), bits, _whole(item, "num_elements", 1, told))
            )
            dtypes.append(item.get("scale_dtype"))
            wrong += [f"residual bin {place}: {line}" for line in told]
        rest = k - exact - sum(item.count for item in bins)
        if not wrong and rest < 0:
            wrong.append(f"exact_k and residual_bins: {k - rest} log-probs, more than k, {k}")
        wrong += [f"dtype {name!r}" for name in dtypes if name not in _BYTES]
        if wrong:
            raise ValueError(", ".join(wrong))
        return cls(
            vocab, k, exact, dtypes[0], terms, dtypes[1], tuple(bins),
            bool(data.get("delta_encoding", True)), bool(data.get("normalize_t", False)),
        )  # fmt: skip

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return int(np.ceil(np.log2(np.float32(self.vocab))))

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """Bytes of a position's log-probs."""
        coefficients = len(self.terms) * _BYTES[self.term_dtype]
        return (
            self.exact * _BYTES[self.exact_dtype]
            + coefficients
            + sum(item.bytes for item in self.bins)
        )

    def ids(self, packed_MB: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the K ids of M positions."""
        return _unpacked(packed_MB, self.id_bits, self.k)

    def logprobs(self, packed_MB: NDArray[np.uint8]) -> _Reals:
        """Return the K log-probs of M positions, the largest first."""
        at = 0

        def take(count: int, dtype: str) -> _Reals:
            nonlocal at
            size = count * _BYTES[dtype]
            part = np.ascontiguousarray(packed_MB[:, at : at + size])
            at += size
            return _reals(part, dtype)

        exact_MX = take(self.exact, self.exact_dtype)
        rest = self.k - self.exact
        fit_MR = np.zeros((len(packed_MB), rest))
        if self.terms:
            fit_MR = take(len(self.terms), self.term_dtype) @ self._curves(rest).T
        done = 0
        for item in self.bins:
            scale_M1 = take(1, item.dtype)
            size = item.bytes - _BYTES[item.dtype]
            codes_MC = _unpacked(packed_MB[:, at : at + size], item.bits, item.count)
            at += size
            steps_MC = 2 * codes_MC - 1 if item.bits == 1 else codes_MC - (1 << (item.bits - 1))
            fit_MR[:, done : done + item.count] += steps_MC * scale_M1
            done += item.count
        values_MK = np.concatenate([exact_MX, fit_MR], axis=1)
        decoded_MK: _Reals = values_MK.cumsum(axis=1) if self.delta else values_MK
        return decoded_MK

    def _curves(self, count: int) -> _Reals:
        t = np.linspace(0, 1, count) if self.unit else np.arange(count, dtype=np.float64)
        return np.stack(
            [t**term if isinstance(term, int) else getattr(np, term)(t) for term in self.terms],
            axis=1,
        )


def _whole(data: Mapping[str, Any], name: str, least: int, wrong: list[str]) -> int:
    """Return a whole number of a mapping; the least there may be where it is none, noted."""
    found = data.get(name)
    if type(found) is int and found >= least:
        return found
    wrong.append(
        f"{name}: found {found!r}, expected a whole number from {least}"
        if name in data
        else f"no {name}"
    )
    return least


def _listed(data: Mapping[str, Any], wrong: list[str]) -> list[Mapping[str, Any]]:
    bins = data.get("residual_bins") or []
    if isinstance(bins, list) and all(isinstance(item, Mapping) for item in bins):
        return bins
    wrong.append(f"residual_bins: found {bins!r}, expected a list of mappings")
    return []


def _reals(part_MB: NDArray[np.uint8], dtype: str) -> _Reals:
    if dtype == "bfloat16":
        return (part_MB.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return part_MB.view({"float16": "<f2", "float32": "<f4"}.get(dtype, "<f8")).astype(np.float64)


def _unpacked(packed_MB: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return integers of so many bits each, the most significant first."""
    flat_MB = np.unpackbits(np.ascontiguousarray(packed_MB), axis=1, count=bits * count)
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return flat_MB.reshape(len(packed_MB), count, bits).astype(np.int64) @ powers
