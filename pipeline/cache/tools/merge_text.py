"""The text that the parts of a cache are made from: it must be one, and it goes along.

One identity does not make one text: another device draws other responses, and a corpus may change
behind its address. Shards of two texts would make a cache whose rows nobody wrote.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.layout.embedded_checksum import has_valid_checksum
from pipeline.cache.layout.inventory import Inventory, decode_plan
from pipeline.cache.layout.names import (
    MANIFEST,
    PLAN,
    RESPONSE_PLAN,
    RESPONSE_UNITS,
    RESPONSES,
    response_name,
)
from pipeline.config import fingerprint
from pipeline.errors import CacheError
from pipeline.storage import Store
from pipeline.storage.parallel import in_threads

__all__ = ["Text", "find_text"]

_CORPORA = "_meta/corpus"
"""Folder of the prepared corpora, each in a folder of its own."""
_TOLD = 8


@dataclass(frozen=True, slots=True)
class Text:
    """Where the parts' text is."""

    stores: Sequence[Store]
    """The target, which an earlier call may have begun, and the sources."""
    files: Mapping[str, int]
    """Each file of responses, with the first store that has it intact."""
    plan: bytes | None
    """Of the responses; with numbers where one has them."""

    def copy(self, workers: int) -> None:
        """Copy responses and prepared corpora: without them stage one would make all again.

        After another version of pyarrow even the same samples would have other checksums, and no
        shard that is recorded would be of them.
        """
        target, *sources = self.stores
        if self.plan is not None and self.plan != _response_plan(target):
            target.write(RESPONSE_PLAN, self.plan)

        def copy_file(item: tuple[str, int]) -> None:
            name, number = item
            if number:  # else the target's own
                target.write(name, self.stores[number].read(name))

        _each(copy_file, sorted(self.files.items()), workers)
        names = {name for source in sources for name in source.folders(_CORPORA)}
        for folder in (RESPONSE_UNITS, *(f"{_CORPORA}/{name}" for name in sorted(names))):
            _copy_prepared(self.stores, folder, workers)

    def counts(self) -> dict[str, int]:
        """Return what a manifest tells of the responses, counted from their files."""
        if not self.files:
            return {}
        total: Counter[str] = Counter(responses=0, responses_unfinished=0)
        for name, number in self.files.items():
            table = _table(self.stores[number].read(name), ["finished", "token_ids"])
            for finished, tokens in zip(*(column.to_pylist() for column in table), strict=True):
                total["responses"] += bool(tokens)
                total["responses_unfinished"] += bool(tokens) and not finished
                if not tokens:
                    total["responses_quarantined"] += 1
        return {**_plan_data(self.plan).get("prompt_counts", {}), **total}


def find_text(
    target: Store, sources: Sequence[Store], inventories: Sequence[Inventory], *, workers: int
) -> Text:
    """Find the text of caches of one identity; reads all responses and writes nothing.

    Args:
        target: the merged cache's root.
        sources: of one identity.
        inventories: of the sources.
        workers: files read at one time.

    Raises:
        CacheError: the sources are made from different texts.
    """
    stores = (target, *sources)
    plans = [_response_plan(store) for store in stores]
    contradictions = [
        *_other_contents(sources, inventories),
        *_other_counts(sources, inventories),
        *_differences(
            [
                (store.full_url(RESPONSE_PLAN), f"{number} files of responses")
                for store, plan in zip(stores, plans, strict=True)
                if (number := _plan_data(plan).get("shards")) is not None
            ]
        ),
    ]
    present = [set(store.list(RESPONSES)) for store in stores]
    names = sorted(name for name in set().union(*present) if name.endswith(".parquet"))

    def compare(name: str) -> tuple[int | None, str]:
        first, tokens = None, b""
        for number, store in enumerate(stores):
            data = _intact(store, f"{RESPONSES}/{name}") if name in present[number] else None
            if data is None:
                continue
            if first is None:
                first, tokens = number, data
            # The text beside the tokens may be written otherwise by another version.
            elif data != tokens and _tokens(data) != _tokens(tokens):
                places = (stores[n].full_url(f"{RESPONSES}/{name}") for n in (first, number))
                return first, " and ".join(places) + ": other responses"
        return first, ""

    files: dict[str, int] = {}
    for name, (first, difference) in zip(names, in_threads(compare, names, workers), strict=True):
        if first is not None:
            files[f"{RESPONSES}/{name}"] = first
        contradictions += [difference] if difference else []
    if contradictions:
        more = len(contradictions) - _TOLD
        told = contradictions[:_TOLD] + ([f"and {more} more"] if more > 0 else [])
        raise CacheError(
            "caches of one identity are made from different texts:\n  - "
            + "\n  - ".join(told)
            + "\n",
            expected="parts of one cache, made from one text",
            do="merge only those of one text; what was drawn or read another time is another cache",
        )
    with_numbers = [plan for plan in plans if "shards" in _plan_data(plan)]
    plan = next((plan for plan in (*with_numbers, *plans) if plan is not None), None)
    if with_numbers:
        planned = {response_name(index) for index in range(_plan_data(plan)["shards"])}
        files = {name: number for name, number in files.items() if name in planned}
    return Text(stores, files, plan)


def _other_contents(sources: Sequence[Store], inventories: Sequence[Inventory]) -> Iterator[str]:
    return _differences(
        [
            (store.full_url(MANIFEST), f"text {inventory.manifest.corpus_content[:12]}")
            for store, inventory in zip(sources, inventories, strict=True)
            if inventory.manifest is not None and inventory.manifest.corpus_content
        ]
    )


def _other_counts(sources: Sequence[Store], inventories: Sequence[Inventory]) -> Iterator[str]:
    found: list[tuple[str, str]] = []
    for store, inventory in zip(sources, inventories, strict=True):
        plan = decode_plan(inventory.plan_raw) if inventory.plan_raw else None
        counts = {
            MANIFEST: inventory.manifest.shard_counts if inventory.manifest else {},
            PLAN: plan.shard_counts if plan else {},
        }
        for name, by_split in counts.items():
            told = [f"{count} shards of {split}" for split, count in by_split.items() if count]
            if told:
                found.append((store.full_url(name), " and ".join(told)))
    return _differences(found)


def _differences(said: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Describe each pair of neighbours that say different things."""
    for (one, of_one), (two, of_two) in pairwise(said):
        if of_one != of_two:
            yield f"{one}: {of_one}; {two}: {of_two}"


def _response_plan(store: Store) -> bytes | None:
    """Return the plan of the responses; None where there is none, or a damaged one."""
    try:
        raw = store.read(RESPONSE_PLAN)
    except FileNotFoundError:
        return None
    data = _plan_data(raw)
    whole = fingerprint(data.get("identity")) == data.get("identity_digest")
    return raw if whole and isinstance(data.get("shards", 0), int) else None


def _plan_data(raw: bytes | None) -> dict[str, Any]:
    with suppress(ValueError):
        data = json.loads(raw or b"")
        return data if isinstance(data, dict) else {}
    return {}


def _intact(store: Store, name: str) -> bytes | None:
    with suppress(FileNotFoundError):
        data = store.read(name)
        return data if has_valid_checksum(data) else None
    return None


def _tokens(data: bytes) -> Any:
    return _table(data, ["response_id", "token_ids"])


def _table(data: bytes, columns: list[str]) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(columns, use_threads=False).replace_schema_metadata(None)


def _copy_prepared(stores: Sequence[Store], folder: str, workers: int) -> None:
    """Copy a prepared corpus from the store with most of its units, as a whole.

    Files of two stores would not go together: a unit's summary has the checksums of its samples.
    """
    target = stores[0]
    source = max(stores, key=lambda store: len(_units(store, folder)))
    if source is target:
        return

    def copy(name: str) -> None:
        with suppress(FileNotFoundError):  # folded since
            target.write(name, source.read(name))

    # A unit's summary says that its samples are there.
    for part in (f"{folder}/tokens", folder, f"{folder}/summaries"):
        _each(copy, [f"{part}/{file}" for file in source.list(part)], workers)


def _units(store: Store, folder: str) -> set[int]:
    """Return the units of a prepared corpus, by the names of its summaries."""
    numbers = (re.findall(r"\d{5,}", file) for file in store.list(f"{folder}/summaries"))
    return set(chain(*(range(int(n[0]), int(n[-1]) + 1) for n in numbers if n)))


def _each(function: Any, items: Sequence[Any], workers: int) -> None:
    for _ in in_threads(function, items, workers):
        pass
