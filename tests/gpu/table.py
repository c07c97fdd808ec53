"""The table of outcomes, on a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tests.gpu.check import Machine, Outcome

__all__ = ["markdown_table", "terminal_lines"]


def terminal_lines(outcome: Outcome) -> list[str]:
    """Return one check's lines: state, name, seconds; then its figures and what went wrong."""
    lines = [f"{outcome.state:<8} {outcome.name:<28} {outcome.seconds:6.0f} s  {outcome.question}"]
    lines += [f"{'':<8} {figure}" for figure in outcome.figures]
    if outcome.message and outcome.state != "passed":
        lines.append(f"{'':<8} {outcome.message}")
    return lines


def markdown_table(machine: Machine, outcomes: Sequence[Outcome]) -> str:
    """Return the table for a document."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    count = f"{machine.gpus} x " if machine.gpus > 1 else ""
    rows = [
        f"| {outcome.name} | {outcome.question} | {outcome.state} | "
        f"{'; '.join(map(str, outcome.figures)) or outcome.message} |"
        for outcome in outcomes
    ]
    return "\n".join(
        [
            f"{count}{machine.device}, {machine.made}; {versions}",
            "",
            "| check | question | state | figures |",
            "|---|---|---|---|",
            *rows,
        ]
    )
