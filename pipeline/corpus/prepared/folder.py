"""The folder of a prepared corpus: its units, what is done of them, and their samples.

corpus.json                        identity and units, written first
summaries/NNNNN.json               one unit; written after its samples: the unit is done
summaries/NNNNN-NNNNN.jsonl.zst    the same of 256 units, folded
tokens/NNNNN-N.parquet             samples of a block, and -candidates.parquet
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import xxhash
import zstandard

from pipeline.cache.layout.manifest import describe_difference
from pipeline.config import fingerprint
from pipeline.corpus.prepared.blocks import TokenisedRow, decode_block, encode_block
from pipeline.corpus.prepared.summary import UnitSummary
from pipeline.corpus.prepared.units import Unit
from pipeline.errors import CorpusError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["FOLD", "SUMMARIES", "DamagedBlock", "PreparedFolder", "fold_range"]

SUMMARIES = "summaries"
FOLD = 256
"""Summaries that are folded into one file: a worker that starts reads that many fewer files."""
_PLAN = "corpus.json"
_READS_AT_ONCE = 16
_OWN_FOLDERS = 3
"""Above the corpus in a cache that has nothing else: `corpus`, `_meta` and the cache itself."""
_TRIES = 2
"""A bit flipped in transfer is right at the second read; one flipped on the disk is not."""
_KINDS = ("", "-candidates")
_FILE = re.compile(r"(\d{5,})(?:\.json|-(\d{5,})\.jsonl\.zst)")


class DamagedBlock(CorpusError):
    """A file of samples that is missing, or whose bytes are not those of its summary."""


def fold_range(index: int) -> range:
    """Return the units whose summaries are joined with a unit's."""
    first = index - index % FOLD
    return range(first, first + FOLD)


def unit_file(index: int) -> str:
    """Return the name of a unit's summary, among the summaries."""
    return f"{index:05d}.json"


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """A prepared corpus, or the beginning of one, at the root of a store."""

    store: Store
    scratch: Store | None = None
    """Takes what is written where the folder itself is only read; what it has comes first."""

    def only_read(self) -> PreparedFolder:
        """Return the same folder for one who only looks: repairs stay in memory."""
        return PreparedFolder(self.store, Store(f"memory://scratch-{uuid.uuid4().hex}"))

    def begin(
        self, identity: dict[str, Any], cut: Callable[[], Sequence[Unit]]
    ) -> tuple[Unit, ...]:
        """Return the units; cut and written by the first who comes.

        Args:
            identity: everything that decides the samples.
            cut: cuts the source.

        Raises:
            CorpusError: the folder holds another corpus, or its file is damaged.
        """
        units = self.units(identity)
        if units is None:
            data = {
                "identity": identity,
                "identity_digest": fingerprint(identity),
                "units": [unit.to_json() for unit in cut()],
            }
            content = json.dumps(data, separators=(",", ":")).encode()
            # Of this worker or of one that was faster: what is written is what all go by. It may be
            # gone again where that one found its corpus of no use.
            while units is None:
                self.store.create(_PLAN, content)
                units = self.units(identity)
        return units

    def units(self, identity: dict[str, Any]) -> tuple[Unit, ...] | None:
        """Return the units that are written, or None where nothing has begun.

        Raises:
            CorpusError: the folder holds another corpus, or its file is damaged.
        """
        try:
            raw = self.store.read(_PLAN)
        except FileNotFoundError:
            return None
        try:
            data = json.loads(raw)
            found = data["identity"]
            if fingerprint(found) != data["identity_digest"]:
                raise ValueError("digest")
            units = tuple(Unit.from_json(index, item) for index, item in enumerate(data["units"]))
        except (ValueError, KeyError, TypeError):
            raise CorpusError(
                f"{self.store.full_url(_PLAN)}: damaged",
                do="delete it; the units are cut again, and those that are done are kept",
            ) from None
        if found != identity:
            raise CorpusError(
                f"{self.store.url}: holds a corpus prepared with other settings "
                f"({describe_difference(found, identity)})",
                expected="an empty folder, or a corpus prepared with these settings",
                do="choose another --corpus.prepared, or delete that folder",
            )
        return units

    def done(self) -> tuple[set[int], list[str]]:
        """Return which units are done and the files that say so, by one listing.

        Joined files come first: a unit's own file counts where both are there, it is newer.
        """
        done: set[int] = set()
        names = []
        for name in self.store.list(SUMMARIES):
            indexes = _range(name)
            if indexes:
                done.update(indexes)
                names.append(name)
        return done, sorted(names, key=lambda name: (not name.endswith(".zst"), name))

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, list[UnitSummary]]]:
        """Yield the summaries of each file; a damaged one is removed, its units are done again.

        A file that is damaged, or was folded meanwhile, gives none.
        """

        def read_one(name: str) -> list[UnitSummary]:
            try:
                raw = self.store.read(f"{SUMMARIES}/{name}")
            except FileNotFoundError:
                return []
            found = _decode(name, raw)
            if found is None:
                if self.scratch is None:
                    self.store.delete(f"{SUMMARIES}/{name}")
                return []
            return found

        yield from zip(names, in_threads(read_one, names, _READS_AT_ONCE), strict=True)

    def commit(self, summary: UnitSummary) -> None:
        """Say that a unit is done; its blocks are written before."""
        name = f"{SUMMARIES}/{unit_file(summary.index)}"
        store = self.scratch or self.store
        store.write(name, summary.to_bytes(), look_back=False)  # it has its own checksum

    def files_of(self, index: int) -> list[str]:
        """Return the files that say that a unit is done; the last one counts."""
        return [name for name in self.done()[1] if index in _range(name)]

    def summary_of(self, index: int) -> UnitSummary | None:
        """Return the summary of a unit, or None where it is not done."""
        found = None
        for _, summaries in self.read(self.files_of(index)):
            for summary in summaries:
                if summary.index == index:
                    found = summary
        return found

    def forget(self, index: int) -> None:
        """Say that a unit is not done; killed at any point, it is not or the others are as well.

        For one worker at a time, and not beside `fold` of the same range.
        """
        for name in self.files_of(index):
            if not name.endswith(".zst"):
                continue
            joined = self._raw(name)
            found = (_decode(name, joined) or []) if joined is not None else []
            others = [summary for summary in found if summary.index != index]
            puts = in_threads(partial(self._put_back, name, joined), others, _READS_AT_ONCE)
            if not all([*puts]):
                return self.forget(index)
            self.store.delete(f"{SUMMARIES}/{name}")
        return self.store.delete(f"{SUMMARIES}/{unit_file(index)}")

    def _put_back(self, joined_name: str, joined: bytes | None, summary: UnitSummary) -> bool:
        """Write a unit's own file out of a joined one; return whether that is still as it was.

        A worker that was paused may come back to one that another has replaced. A unit's own file
        is newer than the joined one, and stays.
        """
        if self._raw(joined_name) != joined:
            return False
        self.store.create(f"{SUMMARIES}/{unit_file(summary.index)}", summary.to_bytes())
        return True

    def to_fold(self, names: Collection[str], num_units: int) -> Iterator[int]:
        """Yield the first units of the ranges that can be folded, by a listing.

        So can those of which a joined file is there already, beside files of single units: its
        worker was killed, or a unit was done again.
        """
        for first in range(0, num_units - FOLD + 1, FOLD):
            singles = [unit_file(index) in names for index in range(first, first + FOLD)]
            if all(singles) or (any(singles) and _joined_file(first) in names):
                yield first

    def fold(self, first: int) -> None:
        """Join the summaries of a range into one file; for one worker at a time.

        Killed at any point, it leaves the summaries readable: the joined file is written before the
        others are removed, and says the same.
        """
        name = _joined_file(first)
        singles = [unit_file(index) for index in range(first, first + FOLD)]
        found: dict[int, UnitSummary] = {}
        files: set[str] = set()
        for file, summaries in self.read([name, *singles]):
            found |= {summary.index: summary for summary in summaries}
            files |= {file} if summaries else set()
        # Paused since, another worker may have folded or forgotten them.
        if len(found) < FOLD or not files <= set(self.store.list(SUMMARIES)):
            return  # one was damaged, and is prepared again
        lines = {file: found[first + n].to_bytes() for n, file in enumerate(singles)}
        data = zstandard.ZstdCompressor(level=9).compress(b"\n".join(lines.values()))
        if self._raw(name) != data:
            self.store.write(f"{SUMMARIES}/{name}", data)
        self._delete_joined(lines, [file for file in singles if file in files])

    def _delete_joined(self, lines: Mapping[str, bytes], singles: Sequence[str]) -> None:
        """Delete the files of single units that say what the joined one says; another is newer."""
        raw = in_threads(self._raw, singles, _READS_AT_ONCE)
        equal = [file for file, found in zip(singles, raw, strict=True) if found == lines[file]]
        self.store.delete_all([f"{SUMMARIES}/{file}" for file in equal])

    def _raw(self, name: str) -> bytes | None:
        try:
            return self.store.read(f"{SUMMARIES}/{name}")
        except FileNotFoundError:
            return None

    def write_block(
        self, unit: int, number: int, rows: tuple[Sequence[TokenisedRow], Sequence[TokenisedRow]]
    ) -> list[str]:
        """Write the samples of a block, train and candidates apart; return the files' checksums."""
        checksums = []
        for kind, part in zip(_KINDS, rows, strict=True):
            checksums.append("")
            if part:
                data = encode_block(part)
                store = self.scratch or self.store
                store.write(_block_name(unit, number, kind), data, look_back=False)
                checksums[-1] = xxhash.xxh3_128_hexdigest(data)
        return checksums

    def read_block(
        self, unit: int, number: int, checksums: Sequence[str], *, train: bool, candidates: bool
    ) -> list[TokenisedRow]:
        """Return samples of a block: those of its train rows, of its candidates, or of both.

        Raises:
            DamagedBlock: a file is missing or damaged.
        """
        rows: list[TokenisedRow] = []
        for kind, wanted, is_asked in zip(_KINDS, checksums, (train, candidates), strict=True):
            if is_asked and wanted:
                rows += decode_block(self._read_file(_block_name(unit, number, kind), wanted))
        if train and candidates:
            rows.sort(key=lambda row: (row.row, row.part))
        return rows

    def remove(self, *others: str) -> None:
        """Remove everything, the folders `others` as well, and folders that are empty then."""
        self.store.delete(_PLAN)
        for folder in (SUMMARIES, "tokens", *others):
            self.store.delete_all([f"{folder}/{name}" for name in self.store.list(folder)])
            self.store.remove_folder(folder)
        self.store.remove_folder("", above=_OWN_FOLDERS)

    def remove_partials(self, *others: str) -> None:
        """Remove unfinished files of killed workers, of the folders `others` as well."""
        self.store.remove_partials(("", SUMMARIES, "tokens", *others))

    def _read_file(self, name: str, wanted: str) -> bytes:
        reason = "missing"
        stores = [self.store] * _TRIES
        if self.scratch is not None and self.scratch.exists(name):
            stores = [self.scratch]
        for store in stores:
            try:
                data = store.read(name)
            except FileNotFoundError:
                break
            found = xxhash.xxh3_128_hexdigest(data)
            if found == wanted:
                return data
            reason = f"checksum {found[:12]}..., not {wanted[:12]}..."
        raise DamagedBlock(f"{self.store.full_url(name)}: damaged ({reason})")


def _joined_file(first: int) -> str:
    return f"{first:05d}-{first + FOLD - 1:05d}.jsonl.zst"


def _block_name(unit: int, number: int, kind: str) -> str:
    return f"tokens/{unit:05d}-{number}{kind}.parquet"


def _range(name: str) -> range:
    """Return the units that a file is of; none where it is no file of summaries."""
    found = _FILE.fullmatch(name)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


def _decode(name: str, raw: bytes) -> list[UnitSummary] | None:
    try:
        if name.endswith(".zst"):
            raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    except zstandard.ZstdError:
        return None
    found = [UnitSummary.from_bytes(line) for line in raw.split(b"\n")]
    indexes = [None if summary is None else summary.index for summary in found]
    if indexes != list(_range(name)):
        return None
    return [summary for summary in found if summary is not None]
