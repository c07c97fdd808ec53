"""The command line of `python -m pipeline.cache`: one message per mistake, and progress."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import pytest

from pipeline.cache import __main__ as command_module
from pipeline.cache.__main__ import main
from pipeline.cache.tools.commands import parse
from pipeline.errors import ConfigError, run_command
from tests.conftest import digests

COMMANDS = [
    "inspect",
    "verify",
    "stats",
    "repair",
    "slice",
    "merge",
    "export",
    "import",
    "push",
    "pull",
]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "verfy C",
            "'verfy' is not a command; did you mean verify?; expected one of inspect, verify",
        ),
        ("zzz C", "'zzz' is not a command; expected one of inspect"),
        ("verify", "the following arguments are required: URL"),
        ("--json", "'--json' stands before the command; expected one of inspect"),
        ("--verify C", "'--verify' is not a command; did you mean verify?"),
        ("verify --chekc", "--chekc: unknown flag; did you mean --check?; the following"),
        ("verify C --check chekcsum", "--check: found 'chekcsum', expected size or checksum or"),
        ("verify C --check chekcsum", "did you mean checksum?"),
        (
            "slice C D --samples x --frction 0.1 --top-k 0",
            "--samples: found 'x', expected a whole number, at least 1; "
            "--frction: unknown flag; did you mean --fraction?; "
            "--top-k: found '0', expected a whole number, at least 1",
        ),
        (f"slice C D --samples {'9' * 5000}", f"found '{'9' * 40}...', expected a whole number"),
        ("slice C D --samples", "argument --samples: expected one argument"),
        ("repair C --shards train-1", "--shards: found 'train-1', expected names such as"),
        ("stats C --column", "--column: unknown flag; did you mean --columns?"),
        ("verify C --chekc size", "verify: --chekc: unknown flag; did you mean --check?"),
        ("verify C --work 3", "--work: unknown flag; did you mean --workers?"),  # no abbreviations
        ("verify C D", "'D' is one address too many"),
        (
            "slice C D --tpo-k=3 --sampels 4",
            "--tpo-k: unknown flag; did you mean --top-k?; "
            "--sampels: unknown flag; did you mean --samples?",
        ),
        ("slice C D --top-k abc", "--top-k: found 'abc', expected a whole number, at least 1"),
        ("slice C D --top-k 1.5", "found '1.5', expected a whole number"),
        ("verify C --workers 0", "--workers: found '0', expected a whole number, at least 1"),
        ("slice C D --fraction half", "found 'half', expected a number above 0 and at most 1"),
        ("slice C D --fraction nan", "found 'nan', expected a number above 0 and at most 1"),
        ("slice C D --split trian", "found 'trian', expected train or heldout; did you mean train"),
        ("merge C", "required: TARGET"),
        ("export C", "required: TARGET"),
    ],
)
def test_a_mistake_is_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: main(line.split())) == ConfigError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_no_name_of_our_own_functions_is_shown() -> None:
    """argparse shows the name of a type that raises ValueError: "invalid _count value"."""
    for flag in ("--top-k", "--tau-factor", "--samples", "--fraction", "--split", "--workers"):
        for value in ("x", "", "-1", "1e999", "nan", "9" * 5000, "\u0663", "\u00b2", "None"):
            with contextlib.suppress(ConfigError):
                parse(["slice", "C", "D", f"{flag}={value}"])
                continue
            with pytest.raises(ConfigError) as caught:
                parse(["slice", "C", "D", f"{flag}={value}"])
            assert "found" in str(caught.value)
            assert "invalid" not in str(caught.value)


def test_flags_may_have_underscores_as_those_of_the_stages() -> None:
    options = parse(["slice", "C", "my_folder", "--top_k", "3", "--tau_factor=2"])
    assert (options.target, options.top_k, options.tau_factor) == ("my_folder", 3, 2.0)


def test_the_source_comes_first_in_every_command() -> None:
    assert (parse(["slice", "A", "B"]).source, parse(["slice", "A", "B"]).target) == ("A", "B")
    assert (parse(["export", "A", "B"]).source, parse(["export", "A", "B"]).target) == ("A", "B")
    lines = "A B C", "A B C --workers 2", "A B --workers 2 C", "--workers=2 A B C", "A -- B C"
    for line in lines:
        merged = parse(["merge", *line.split()])
        assert (merged.sources, merged.target) == (["A", "B"], "C"), line
        assert merged.workers == (2 if "2" in line else None)


@pytest.mark.parametrize(
    "line", ["slice NEW CACHE --samples 3", "export NEW CACHE", "merge NEW CACHE"]
)
def test_addresses_in_the_wrong_order_are_told(line: str, cache_dir: Path, tmp_path: Path) -> None:
    before = digests(cache_dir)
    new = tmp_path / "new"
    arguments = line.replace("NEW", str(new)).replace("CACHE", str(cache_dir)).split()
    with pytest.raises(ConfigError) as caught:
        main(arguments)
    message = str(caught.value)
    assert f"{new} holds no cache, and {cache_dir}, which stands last, holds one" in message
    assert f"did you mean python -m pipeline.cache {arguments[0]} {cache_dir} {new}?" in message
    assert digests(cache_dir) == before
    assert not new.exists()


def test_a_whole_cache_has_nothing_to_repair(
    cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(cache_dir)
    assert main(["repair", str(cache_dir), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out == (
        f"{cache_dir}: 3 shards intact (every byte compared); there is nothing to repair\n"
    )
    assert digests(cache_dir) == before


def test_progress_off_a_terminal_is_lines_with_what_is_left(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "_EVERY_S", 0.0)
    assert main(["stats", str(made)]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^stats: \d+/\d+ rows \(\d+\.\d %\), .*rows/s", err, re.MULTILINE)
    assert "\r" not in err


def test_help_shows_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], *([name, "--help"] for name in COMMANDS)):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        examples = re.findall(r"^  python -m pipeline.cache (.+)$", text, re.MULTILINE)
        assert examples
        for example in examples:
            options = parse(shlex.split(example))
            assert options.command in COMMANDS
            assert arguments in ([], ["--help"]) or options.command == arguments[0]
