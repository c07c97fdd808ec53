"""Push a finished student to the hub, again if need be; nothing is trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import field_validator

from pipeline.config import Settings, option, parse_command
from pipeline.errors import ResumeError, run_command
from pipeline.program import command_name
from pipeline.student.settings.student import is_repository

__all__ = ["PushRun", "main"]

PROG = command_name("stages.push_student")


class PushRun(Settings):
    """What goes where."""

    output_dir: str = option("runs/default/student", "folder of the finished run")
    hub_location: str = option(..., "repository on the hub, such as your-name/your-student")

    @field_validator("hub_location")
    @classmethod
    def _named(cls, name: str) -> str:
        if not is_repository(name):
            raise ValueError(
                f"found {name!r}, expected a repository such as your-name/your-student"
            )
        return name


def main(argv: Sequence[str] | None = None) -> int:
    """Upload `output_dir/model`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = parse_command(PushRun, arguments, prog=PROG, description=__doc__ or "").settings
    folder = Path(run.output_dir) / "model"
    if not (folder / "config.json").exists():
        raise ResumeError(
            f"{folder}: no finished student",
            expected="a run of train-student that has ended",
            do="run the train-student command again; it goes on where it stopped",
        )
    from pipeline.student.output.hub import push_to_hub

    print(f"pushed to {push_to_hub(folder, run.hub_location)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
