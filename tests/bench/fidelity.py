"""Gradient error against bytes per token of every scheme, on the same teacher outputs.

`make bench-fidelity` prints the table, writes the plot, and ends with the figures and their spread
over texts and students. Every scheme of this project runs through the production code: sampler,
codec and Parquet (bytes of all target columns), reader, collation, and the training loss. Rows of
other projects run by their code from the checkouts given (`--peer distillkit=PATH`); without one
they are rebuilt in plain torch, on exact log-probs, and say so. The caption says what was run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.errors import run_command
from tests.bench.fidelity_data import Hidden, hidden_states
from tests.bench.fidelity_plot import plot, save
from tests.bench.fidelity_run import (
    BUCKET,
    DRAWS,
    GRID,
    SCHEMES,
    T2_SCHEME,
    Table,
    at,
    bytes_at,
    run,
    sampled,
)  # fmt: skip
from tests.bench.fidelity_spread import spread
from tests.bench.peers.adapters import PROJECTS, add_peer_option, caption, peers_of
from tests.bench.peers.checkout import Checkout, parse

__all__ = ["SCHEMES", "Table", "run", "sampled"]

SHORT, LONG, SPREAD = 8192, 65_536, 8192


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="teacher: `embedded` or a model folder")
    parser.add_argument("--dropped", default="12,20", help="layers removed from the student")
    parser.add_argument("--plot", type=Path, default=None, help="write the plot here (PNG or SVG)")
    parser.add_argument("--short", type=int, default=SHORT, help="tokens of the table; 0: none")
    parser.add_argument("--long", type=int, default=LONG, help="tokens at T = 2; 0: none")
    parser.add_argument(
        "--spread", type=int, default=SPREAD, help="tokens of each text of the spread; 0: none"
    )
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help="of each scheme with sampled entries"
    )
    parser.add_argument("--only_peers", action="store_true", help="the table without our schemes")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens, no plot")
    add_peer_option(parser)
    arguments = parser.parse_args()
    checkouts = parse(arguments.peer, PROJECTS)
    short, long, texts = arguments.short, arguments.long, arguments.spread
    if arguments.quick:
        short, long, texts = short // 8, long // 8, texts // 8
    if short or long:
        dropped = tuple(map(int, arguments.dropped.split(",")))
        hidden = hidden_states(max(short, long), model=arguments.model, dropped=dropped)
        if short:
            _short(hidden, short, arguments.draws, checkouts, only_peers=arguments.only_peers)
        if long:
            _long(hidden, long, arguments.draws)
    if texts:
        spread(texts, short=SHORT, long=LONG)
    if arguments.plot and not arguments.quick:
        plot(arguments.plot)


def _short(
    hidden: Hidden, tokens: int, draws: int, checkouts: dict[str, Checkout], *, only_peers: bool
) -> None:
    """Print the table of all schemes, and what the rows of other projects are."""
    peers = peers_of(checkouts, len(hidden.weight_VD))
    schemes = {} if only_peers else SCHEMES
    table = run(hidden.head(tokens), schemes, GRID, draws=draws, peers=peers)
    print(f"{tokens} tokens, V = {len(hidden.weight_VD)}; weight-gradient error, % of dense KL's; "
          "RMSE of log-probs that come back, nats")  # fmt: skip
    heads = f"{'entries':>8} {'bytes':>7} {'RMSE':>7} {'T = 1':>7} {'T = 2':>7}"
    print(f"{'scheme':<56} {heads}")
    for name, row in table.items():
        cells = [
            f"{row.bytes_per_token:7.1f}" if row.bytes_per_token is not None else "      -",
            f"{row.rmse:7.3f}" if row.rmse is not None else "      -",
            *(f"{100 * row.at[t][-1]:7.2f}" if t in row.at else "      -" for t in GRID),
        ]
        print(f"{name:<56} {row.entries:8.1f} {' '.join(cells)}")
    print(caption(checkouts, peers))
    if only_peers:
        return
    save(table, "short", (tokens,))
    print(f"FIGURE target_bytes_at_4_percent {bytes_at(table, 0.04):.2f}", flush=True)
    print(f"FIGURE weight_gradient_error_t1_percent {100 * table[T2_SCHEME].at[1.0][-1]:.2f}")


def _long(hidden: Hidden, tokens: int, draws: int) -> None:
    """Show that the error of sampled targets falls as 1 / sqrt(tokens) and the bucket's does
    not."""
    marks = tuple(tokens // n for n in (16, 8, 4, 2))
    schemes = {name: SCHEMES[name] for name in (T2_SCHEME, BUCKET)}
    print("T = 2")
    table = run(hidden.head(tokens), schemes, (2.0,), marks=marks, draws=draws, noted=_line)
    sizes = {name: row.bytes_per_token or 0.0 for name, row in table.items()}
    print(", ".join(f"{name}: {size:.1f} bytes" for name, size in sizes.items()))
    counts = (*marks, tokens)
    save(table, "long", counts)
    errors = [at(LONG, counts, table[name].at[2.0]) for name in (T2_SCHEME, BUCKET)]
    if tokens != LONG:
        print(f"fitted at {LONG} tokens: " + ", ".join(f"{100 * error:.2f}" for error in errors))
    print(f"FIGURE t2_error_over_bucket64 {errors[0] / errors[1]:.3f}")
    print(f"FIGURE t2_bytes_over_bucket64 {sizes[T2_SCHEME] / sizes[BUCKET]:.3f}")


def _line(table: Table, tokens: int) -> None:
    """Print the errors so far, so that a run that is stopped has printed results."""
    cells = [
        f"{name} {', '.join(f'{100 * errors[-1]:.2f}' for errors in row.at.values())}"
        for name, row in table.items()
    ]
    print(f"{tokens} tokens, error in %: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
