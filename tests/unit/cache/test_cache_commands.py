"""The command line of `python -m pipeline.cache`: one message per mistake, and progress."""

from __future__ import annotations

import re
import shlex

import pytest

from pipeline.cache.__main__ import main
from pipeline.cache.tools.commands import parse
from pipeline.errors import ConfigError, run_command

COMMANDS = ["inspect", "verify", "stats", "repair", "slice", "merge", "export"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "verfy C",
            "'verfy' is not a command; did you mean verify?; expected one of inspect, verify",
        ),
        ("zzz C", "'zzz' is not a command; expected one of inspect"),
        ("verify", "the following arguments are required: URL"),
        ("--json", "required: COMMAND"),
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
        ("merge C", "required: URL"),
    ],
)
def test_a_mistake_is_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: main(line.split())) == ConfigError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


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
