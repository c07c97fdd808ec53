"""The caches of a run as a user names them: one address, or a list with weights and tags."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ValidationError, field_validator

from pipeline.config import Settings, option
from pipeline.config.fields import leaves
from pipeline.config.mistakes import describe_errors

__all__ = ["CacheDir", "CacheShare", "cache_text", "cache_urls", "caches_named", "read_cache_dir"]

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class CacheShare(Settings):
    """One cache of a mixture."""

    url: str = option(..., "the cache: a folder, or any address fsspec opens", min_length=1)
    weight: float = option(1.0, "its part of the batches, relative to the other caches'", gt=0)
    tag: str = option(..., "its name in metrics and reports")

    @field_validator("tag")
    @classmethod
    def _is_a_name(cls, tag: str) -> str:
        if not _TAG.fullmatch(tag):
            raise ValueError(
                f"found {tag!r}, expected letters, digits, _, . and -, a letter or digit first"
            )
        return tag


def read_cache_dir(value: Any) -> Any:
    """Return an address as it is, and a list as shares; a tag that is not given is the URL's end.

    Raises:
        ValueError: with every mistake of the list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"found {value!r}, expected an address or a list of caches") from None
    if not isinstance(value, list | tuple):
        return value
    shares, mistakes = [], []
    for place, item in enumerate(value, 1):
        if isinstance(item, CacheShare):
            shares.append(item)
            continue
        data = {"url": item} if isinstance(item, str) else item
        if isinstance(data, dict) and isinstance(data.get("url"), str):
            data = {"tag": _last_part(data["url"]), **data}
        try:
            shares.append(CacheShare.model_validate(data))
        except ValidationError as error:
            told = describe_errors(error, list(leaves(CacheShare)))
            mistakes += [f"cache {place}: {line.lstrip(': ')}" for line in told]
    if not value:
        mistakes.append("found an empty list, expected at least one cache")
    for tag, times in Counter(share.tag for share in shares).items():
        if times > 1:
            mistakes.append(f"found the tag {tag} {times} times, expected another for each cache")
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return tuple(shares)


CacheDir = Annotated[str | tuple[CacheShare, ...], BeforeValidator(read_cache_dir)]
"""An address, or a mixture of caches."""


def cache_urls(cache_dir: str | tuple[CacheShare, ...]) -> list[str]:
    """Return the addresses, in order."""
    return [cache_dir] if isinstance(cache_dir, str) else [share.url for share in cache_dir]


def cache_text(cache_dir: str | tuple[CacheShare, ...]) -> str:
    """Return the caches in one line, for people."""
    if isinstance(cache_dir, str):
        return cache_dir
    return " + ".join(f"{share.weight:g} {share.url}" for share in cache_dir)


def caches_named(cache_dir: str | tuple[CacheShare, ...]) -> list[tuple[str, str]]:
    """Return tag and address of each cache, in order: all but the weights; one has no tag."""
    if isinstance(cache_dir, str):
        return [("", cache_dir)]
    return [(share.tag, share.url) for share in cache_dir]


def _last_part(url: str) -> str:
    return PurePosixPath(url.rstrip("/")).name
