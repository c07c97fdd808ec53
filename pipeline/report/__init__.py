"""The report people look at: data in, one self-contained page, PNGs and a terminal table out."""

from pipeline.report.data.curves import curves_from_metrics
from pipeline.report.data.records import (
    CacheFacts,
    Command,
    Curve,
    Difference,
    Generation,
    Measure,
    Passage,
    Report,
    Row,
    SettingDifference,
    ShardFacts,
    Speed,
    SweepFacts,
    SweepPoint,
    TokenView,
)
from pipeline.report.text.table import terminal_table
from pipeline.report.text.wording import difference_sentence, headline
from pipeline.report.write import read_report, write_report

__all__ = [
    "CacheFacts",
    "Command",
    "Curve",
    "Difference",
    "Generation",
    "Measure",
    "Passage",
    "Report",
    "Row",
    "SettingDifference",
    "ShardFacts",
    "Speed",
    "SweepFacts",
    "SweepPoint",
    "TokenView",
    "curves_from_metrics",
    "difference_sentence",
    "headline",
    "read_report",
    "terminal_table",
    "write_report",
]
