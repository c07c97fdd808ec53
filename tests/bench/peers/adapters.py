"""All adapters, and the rows of a bench for the checkouts that it was given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.bench.peers import axolotl, distillkit, lightning_opd, megatron, ms_swift, trl, verl
from tests.bench.peers.checkout import Checkout, Project
from tests.bench.peers.rebuilt import rebuilt
from tests.bench.peers.seam import Peer

__all__ = ["PROJECTS", "add_peer_option", "caption", "peers_of"]


@dataclass(frozen=True, slots=True)
class _Adapter:
    project: Project
    peers: Callable[[Checkout, int], list[Peer]]
    """Of a checkout and the size of the vocabulary."""
    no_row: str = ""
    """Why there is none."""


_ADAPTERS = {
    adapter.project.key: adapter
    for adapter in (
        _Adapter(distillkit.PROJECT, distillkit.peers),
        _Adapter(axolotl.PROJECT, axolotl.peers),
        _Adapter(verl.PROJECT, verl.peers),
        _Adapter(ms_swift.PROJECT, ms_swift.peers),
        _Adapter(trl.PROJECT, trl.peers),
        _Adapter(megatron.PROJECT, megatron.peers),
        _Adapter(lightning_opd.PROJECT, lightning_opd.peers, lightning_opd.NO_ROW),
    )
}
PROJECTS: Mapping[str, Project] = {key: adapter.project for key, adapter in _ADAPTERS.items()}


def add_peer_option(parser: argparse.ArgumentParser) -> None:
    """Add `--peer NAME=PATH`."""
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH",
        help=f"rows of another project by its own code, from a checkout: {', '.join(PROJECTS)}",
    )  # fmt: skip


def peers_of(checkouts: Mapping[str, Checkout], vocabulary: int) -> list[Peer]:
    """Return rows by the code of the checkouts, and rebuilt ones of the other projects.

    Raises:
        ConfigError: a checkout's files are not those that the adapter knows.
    """
    found = [
        peer
        for key, checkout in checkouts.items()
        for peer in _ADAPTERS[key].peers(checkout, vocabulary)
    ]
    return [*found, *rebuilt(without=checkouts)]


def caption(checkouts: Mapping[str, Checkout], peers: list[Peer]) -> str:
    """Return what exactly was run: commits, options, and where there is no row, why."""
    lines = [str(checkout) for checkout in checkouts.values()]
    lines += [f"{peer.name}: {peer.options}" for peer in peers]
    lines += [
        f"{checkout.project.title}, no row: it {_ADAPTERS[key].no_row}"
        for key, checkout in checkouts.items()
        if _ADAPTERS[key].no_row
    ]
    return "\n".join(lines)
