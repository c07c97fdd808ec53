"""The page of `--help`: complete, and there at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.api.settings import TeacherRun
from pipeline.config import parse_command
from pipeline.config.fields import leaves


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command(
            TeacherRun, ["--no-such-flag", "--help"], prog="prog", description="It runs.",
            switches={"dry_run": "only plan"},
        )  # fmt: skip
    assert stop.value.code == 0
    page = capsys.readouterr().out
    words = page.split()
    found = list(leaves(TeacherRun))
    assert len(found) > 30
    for leaf in found:
        assert leaf.help, leaf.dotted
        assert any(w.rstrip(",") == f"--{leaf.dotted}" for w in words), leaf.dotted
        assert not leaf.flag or f"--{leaf.flag}" in words
        assert leaf.help.split()[-1] in page
    assert "--dry-run" in words
    assert "--teacher.model, --teacher_model <text> (default embedded)" in page
    assert max(map(len, page.splitlines())) < 140


@pytest.mark.parametrize("name", ["cache_teacher", "train_student"])
def test_help_loads_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; from stages.{name} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'numpy', 'torch', 'vllm', 'transformers', 'deepspeed', 'datasets', 'fsspec',"
        " 's3fs', 'pyarrow', 'huggingface_hub'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert f"usage: python -m stages.{name}" in done.stdout
    assert done.stderr.strip() == "[]"
