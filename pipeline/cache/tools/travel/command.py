"""`push` and `pull`: their flags to a transfer, and what is said at its end."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pipeline.amounts import format_bytes
from pipeline.cache.io.reader import open_cache
from pipeline.cache.tools.derive import check_order
from pipeline.cache.tools.travel.files import CARD
from pipeline.cache.tools.travel.hub import push_to_hub
from pipeline.cache.tools.travel.licence import licensed_card, stated_licence
from pipeline.cache.tools.travel.transfer import Travelled, transfer
from pipeline.errors import Mistakes
from pipeline.storage import Store
from pipeline.storage.hub import HubDataset, is_hub_address
from pipeline.storage.parallel import default_workers

__all__ = ["run_pull", "run_push"]

_Progress = Callable[[int], None]


def run_push(
    options: argparse.Namespace, *, command: str, on_start: _Progress, on_rows: _Progress
) -> str:
    """Publish a cache; return the last line.

    Raises:
        ConfigError: no licence, or for the hub no token; before anything is sent.
        CacheError: as `transfer` and `push_to_hub`.
        StoreError: as these.
    """
    mistakes = Mistakes()
    to_hub = is_hub_address(options.target)
    hub = cache = licence = None
    with mistakes.collected():
        hub = HubDataset(options.target) if to_hub else None
    if not to_hub and (options.private or options.public):
        mistakes.add(
            f"--private, --public: found one of them with {options.target}, expected them with an "
            "address of the hub alone"
        )
    with mistakes.collected():
        cache = open_cache(options.source)
    with mistakes.collected():
        licence = stated_licence(
            options.license,
            name=options.license_name,
            link=options.license_link,
            terms=options.teacher_terms,
            teacher="the teacher" if cache is None else cache.manifest.identity["teacher"]["model"],
        )
    mistakes.raise_any()
    assert cache is not None
    assert licence is not None
    try:
        card = cache.store.read(CARD)
    except FileNotFoundError:
        card = None
    card = licensed_card(cache.manifest, card, licence, command=command)
    if hub is not None:
        private = True if options.private else False if options.public else None
        done = push_to_hub(
            cache,
            hub,
            card=card,
            private=private,
            with_corpus=options.with_corpus,
            on_start=on_start,
            on_rows=on_rows,
        )
        return _said(options.target, done, f"compared on arrival, under {licence.identifier}")
    done = transfer(
        cache,
        Store(options.target),
        card=card,
        check=options.check,
        with_corpus=options.with_corpus,
        workers=options.workers or default_workers(),
        on_start=on_start,
        on_rows=on_rows,
    )
    return _said(options.target, done, f"{_CHECKED[options.check]}, under {licence.identifier}")


def run_pull(options: argparse.Namespace, *, on_start: _Progress, on_rows: _Progress) -> str:
    """Copy a cache from anywhere with its card as it is; return the last line.

    Raises:
        CacheError: as `transfer`.
        StoreError: as `transfer`.
    """
    check_order([options.source], options.target, "pull")
    done = transfer(
        open_cache(options.source),
        Store(options.target),
        check=options.check,
        with_corpus=options.with_corpus,
        workers=options.workers or default_workers(),
        on_start=on_start,
        on_rows=on_rows,
    )
    return _said(options.target, done, _CHECKED[options.check])


_CHECKED = {"checksum": "every byte compared on arrival", "size": "sizes compared on arrival"}


def _said(target: str, done: Travelled, how: str) -> str:
    there = done.files - done.sent
    before = f", {there} were there" if there else ""
    return f"{target}: {done.sent} files of {format_bytes(done.bytes)} sent{before}; {how}"
