"""How this program is called: by make and as modules in a checkout, as `distil` where installed.

The wheel holds the same code as one package, `offline_distill` (`stages/build_backend.py`), so that
it puts no `pipeline` and no `stages` beside a user's own modules.
"""

from __future__ import annotations

from pathlib import Path

VERSION = "0.1.0"

__all__ = [
    "VERSION", "command_name", "how_to_install", "is_installed", "library_path", "module_name",
    "packaged_file", "target_name",
]  # fmt: skip

_PREFIX = __name__.removesuffix("pipeline.program")
_COMMAND = "distil"


def is_installed() -> bool:
    """Return whether this is the wheel's code, not a checkout's."""
    return bool(_PREFIX)


def module_name(name: str) -> str:
    """Return the full name of a module, such as `stages.cache_teacher`, for `python -m`."""
    return _PREFIX + name


def library_path(path: str) -> str:
    """Return the name of a module of the library without what comes before it: `cache.io.reader`.

    Args:
        path: a full name, as loggers have it.
    """
    return path.removeprefix(_PREFIX + "pipeline.")


def command_name(name: str) -> str:
    """Return how a module is called from a shell: `python -m stages.sweep`, or `distil sweep`."""
    if not is_installed():
        return f"python -m {name}"
    return f"{_COMMAND} {name.rsplit('.', 1)[-1].replace('_', '-')}"


def target_name(target: str, arguments: str = "") -> str:
    """Return how a make target is called: `make train-student`, or `distil train-student`.

    Args:
        target: its name; a command of `distil` has the same.
        arguments: options of the stage.
    """
    if is_installed():
        return f"{_COMMAND} {target} {arguments}".rstrip()
    return f"make {target}" + (f' ARGS="{arguments}"' if arguments else "")


def how_to_install(role: str, *packages: str) -> str:
    """Return what to do where a package is missing.

    Args:
        role: `teacher`, `student`, `flash` or `embedded`: an extra of the wheel, and but for the
            last a `make setup-` target.
        packages: that `role` does not bring.
    """
    if packages:
        environment = f" into the {role}'s environment" if role in ("teacher", "student") else ""
        return f"install {' '.join(packages)}{environment}"
    if is_installed():
        return f"run `pip install 'offline-distill[{role}]'`"
    return "run `make setup`" if role == "embedded" else f"run `make setup-{role}`"


def packaged_file(path: str) -> Path:
    """Return where a file is that comes with the program, such as `stages/configs/student.yaml`.

    It is the file of that name in the current folder, where there is one.
    """
    given = Path(path)
    if given.exists() or given.is_absolute():
        return given
    beside = Path(__file__).parents[1] / given
    return beside if beside.exists() else given
