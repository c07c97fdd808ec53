"""The files of a report: complete, replaced at once, the same for the same numbers."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StoreError
from pipeline.report import (
    Curve,
    Generation,
    Report,
    read_report,
    write_report,
)
from pipeline.report.charts.png import chosen_curves, curves_png
from tests.unit.report.sample import sample_report


def test_all_files_are_written_and_the_json_reads_back(tmp_path: Path) -> None:
    report = sample_report(num_steps=30)
    page = write_report(report, tmp_path / "deep" / "report")
    assert page == tmp_path / "deep" / "report" / "report.html"
    names = sorted(item.name for item in page.parent.iterdir())
    assert names == ["cross_entropy.png", "kl.png", "loss.png", "report.html", "report.json"]
    assert read_report(page.parent / "report.json") == report
    for name in ("cross_entropy.png", "kl.png", "loss.png"):
        data = (page.parent / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 1050, "wide enough for a slide, with a margin"
        assert 600 < height < 900, "chart, heading and legend"


def test_a_second_write_gives_the_same_bytes(tmp_path: Path) -> None:
    report = sample_report(num_steps=30)
    for name in ("a", "b"):
        write_report(report, tmp_path / name)
    for item in (tmp_path / "a").iterdir():
        assert item.read_bytes() == (tmp_path / "b" / item.name).read_bytes(), item.name


def test_half_an_emoji_and_foreign_letters_are_kept_in_json(tmp_path: Path) -> None:
    report = Report("ü 漢", (), generations=(Generation("\ud83d", {"x": "\u2028"}),))
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report
    assert "ü 漢" in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_without_curves_there_are_no_pictures(tmp_path: Path) -> None:
    write_report(Report("t", ()), tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = sample_report(num_steps=3)
    write_report(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def refuse(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match="No space left on device"):
        write_report(replace(report, title="new"), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}'])
def test_a_file_that_is_no_report_is_a_user_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_report(path)
    with pytest.raises(ConfigError, match="expected a report"):
        read_report(tmp_path / "absent.json")


def test_curves_are_sorted_into_pictures_by_their_heading() -> None:
    curves = [
        Curve("Training loss", ((0, 1.0),)),
        Curve("train/kl", ((0, 1.0),)),
        Curve("Held-out KL", ((0, 1.0),)),
        Curve("held-out cross-entropy", ((0, 1.0),)),
        Curve("Blossom", ((0, 1.0),)),
        Curve("loss", ()),
        Curve("loss time", ((0, 1.0),), group="speed"),
    ]
    chosen = chosen_curves(curves)
    assert {name: [c.name for c in some] for name, some in chosen.items()} == {
        "loss.png": ["Training loss"],
        "kl.png": ["train/kl", "Held-out KL"],
        "cross_entropy.png": ["held-out cross-entropy"],
    }


def test_held_out_curves_stand_alone_where_they_were_measured_along_the_way() -> None:
    points = ((0, 2.0), (10, 1.5), (20, 1.0))
    training = Curve("training KL", tuple((step, 1.0) for step in range(20)))
    held_out = [Curve("held-out KL", points, name) for name in ("a", "b")]
    assert chosen_curves([training, *held_out]) == {"kl.png": held_out}
    ends = Curve("held-out KL", points[::2])
    assert chosen_curves([training, ends]) == {"kl.png": [training, ends]}


def test_a_dollar_sign_in_a_name_starts_no_formula() -> None:
    curve = Curve("loss $x", ((0, 1.0), (1, 2.0)), "a $ b", unit="$")
    assert curves_png([curve, curve]).startswith(b"\x89PNG")
