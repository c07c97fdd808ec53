"""The report people look at: records in, one self-contained page, PNGs and a terminal table out."""

from pipeline.report.data.cache import CacheFacts, ShardFacts
from pipeline.report.data.measures import Difference, Measure, Row
from pipeline.report.data.report import Report
from pipeline.report.data.runs import (
    Command,
    Curve,
    Generation,
    Passage,
    SettingDifference,
    Speed,
    TokenView,
)
from pipeline.report.data.sweep import SweepFacts, SweepPoint
from pipeline.report.text.headline import headline
from pipeline.report.text.sentences import difference_sentence
from pipeline.report.text.table import terminal_table
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
    "difference_sentence",
    "headline",
    "read_report",
    "terminal_table",
    "write_report",
]
