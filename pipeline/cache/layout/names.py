"""Names of a cache's files, and the numbers in them: five digits at least, more from 100,000 on."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from pipeline.program import command_name

__all__ = [
    "CARD",
    "CHECKS",
    "ENVIRONMENT",
    "FOREIGN",
    "MANIFEST",
    "PLAN",
    "RECORDS",
    "RESPONSES",
    "RESPONSE_PLAN",
    "RESPONSE_UNITS",
    "SEGMENT_SHARDS",
    "SPLITS",
    "SegmentName",
    "parse_segment",
    "parse_shard",
    "record_name",
    "repair_advice",
    "response_name",
    "segment_name",
    "shard_label",
    "shard_name",
    "tokenizer_name",
]

MANIFEST = "_meta/manifest.json"
PLAN = "_meta/plan.json"
ENVIRONMENT = "_meta/environment.json"
"""What the first worker's teacher ran on."""
RECORDS = "_meta/shards"
"""Folder of the segments of records."""
RESPONSES = "_meta/responses"
"""Folder of the responses, where the teacher wrote them."""
RESPONSE_PLAN = f"{RESPONSES}/plan.json"
"""Whose the responses are and, once that is known, how many files of them there are."""
RESPONSE_UNITS = f"{RESPONSES}/units"
"""The samples that they became, a prepared corpus: only stage one reads it."""
CARD = "README.md"
SPLITS = ("train", "heldout")
CHECKS = ("size", "checksum", "decode")
"""What `verify` compares of each shard: its size; its bytes; its bytes and all that its rows decode
to."""
FOREIGN = ("plain", "distillkit", "axolotl", "verl")
"""Forms of other projects' files that `import` reads."""
SEGMENT_SHARDS = 1024
"""Shards of a segment at most; a segment lies between two multiples of this number. At 200,000
shards a cache has 196 segments: few enough to read at each end of stage one, and a manifest of 70
KB; a segment is written again for each damaged shard in it, so it must not be large either."""

_NUMBER = r"(\d{5}|[1-9]\d{5,})"
_SPLIT = "|".join(SPLITS)
_SEGMENT = re.compile(rf"({_SPLIT})-{_NUMBER}(?:-{_NUMBER})?\.parquet")
_LABEL = re.compile(rf"({_SPLIT})[-/]{_NUMBER}")


def repair_advice(url: str) -> str:
    """Return what to do about a damaged file of a complete cache, the same in every message."""
    address = shlex.quote(url)
    command = command_name("pipeline.cache")
    return f"run {command} repair {address}; it writes again only what is damaged"


def shard_name(split: str, index: int) -> str:
    """Return the shard's path inside the cache."""
    return f"data/{split}/{index:05d}.parquet"


def shard_label(split: str, index: int) -> str:
    """Return what a shard is called in leases, lists and messages, such as `train-00000`."""
    return f"{split}-{index:05d}"


def parse_shard(label: str) -> tuple[str, int] | None:
    """Return split and index of a label such as `train-00000`; None where it is none."""
    found = _LABEL.fullmatch(label)
    return (found[1], int(found[2])) if found else None


def record_name(split: str, index: int) -> str:
    """Return the path of the record of one shard alone, as it is committed."""
    return segment_name(split, index, index)


def segment_name(split: str, first: int, last: int) -> str:
    """Return the path of the records of the shards `first` to `last`."""
    end = "" if first == last else f"-{last:05d}"
    return f"{RECORDS}/{split}-{first:05d}{end}.parquet"


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """Which records a file holds, as its name says."""

    split: str
    first: int
    last: int

    @property
    def path(self) -> str:
        """The path inside the cache."""
        return segment_name(self.split, self.first, self.last)

    @property
    def shards(self) -> range:
        """The indexes of its shards."""
        return range(self.first, self.last + 1)


def parse_segment(file: str) -> SegmentName | None:
    """Return what the name of a file among the records says; None where it is no segment's."""
    found = _SEGMENT.fullmatch(file)
    if found is None:
        return None
    first = int(found[2])
    last = first if found[3] is None else int(found[3])
    ordered = found[3] is None or first < last
    one_block = first // SEGMENT_SHARDS == last // SEGMENT_SHARDS
    return SegmentName(found[1], first, last) if ordered and one_block else None


def response_name(index: int) -> str:
    """Return the path of a file of responses inside the cache."""
    return f"{RESPONSES}/{index:05d}.parquet"


def tokenizer_name(file: str) -> str:
    """Return the path of a tokenizer file inside the cache."""
    return f"_meta/tokenizer/{file}"
