"""Which models a finished student is compared with: what it was before, a control, its teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import fingerprint
from pipeline.config.fields import suggestion
from pipeline.config.files import read_config_file
from pipeline.errors import ConfigError, DistillError, ModelError

if TYPE_CHECKING:
    from pipeline.models.resolved import ResolvedModel

__all__ = ["Compared", "compared_models"]

_OWN = ("before", "control", "teacher")
_WEIGHTS = (".safetensors", ".json", ".jinja", ".model")


@dataclass(frozen=True, slots=True)
class Compared:
    """One model, on this machine."""

    name: str
    source: str
    """Folder or hub id."""
    folder: Path
    revision: str
    """What a result belongs to: a commit, or a digest of the folder as it is now."""


def compared_models(
    output_dir: Path, *, compare: Sequence[str], without: Sequence[str]
) -> list[Compared]:
    """Find the student of a run and the models beside it; nothing is downloaded or loaded.

    Args:
        output_dir: of a finished run.
        compare: further models, `NAME=FOLDER_OR_HUB_ID`; one named as ours takes its place.
        without: names to leave out.

    Returns:
        The student first.

    Raises:
        ConfigError: names that are none.
        ModelError: models that are not on this machine, all of them.
    """
    from pipeline.models.resolve import resolve_model

    given = _given(compare, without)
    wanted: dict[str, tuple[str, str | None] | DistillError] = {
        "student": (str(output_dir / "model"), None)
    }
    for name in _OWN:
        if name not in without and name not in given:
            found = _own(name, output_dir)
            if found is not None:
                wanted[name] = found
    wanted |= {name: (source, None) for name, source in given.items() if name not in without}
    models, lacking = [], []
    for name, found in wanted.items():
        try:
            if isinstance(found, DistillError):
                raise found
            source, revision = found
            model = resolve_model(source, revision=revision, role=name, download=False)
        except DistillError as error:
            told = str(error).rstrip(".")
            lacking.append((name, told if told.startswith(name) else f"{name}: {told}"))
            continue
        models.append(Compared(name, source, model.path, _identity(model)))
    if lacking:
        lines = [line for _, line in lacking]
        text = lines[0] if len(lines) == 1 else "".join(f"\n  - {line}" for line in lines)
        names = ",".join(name for name, _ in lacking)
        what = "a model" if len(lines) == 1 else f"{len(lines)} models"
        raise ModelError(
            f"{what} of the comparison cannot be had: {text}",
            do=f"or leave it out: --without {names}",
        )
    return models


def _identity(model: ResolvedModel) -> str:
    if ":" not in model.revision:
        return model.revision
    # A folder's digest reads parts of large files alone: a student that was trained anew in the
    # same folder differs by its time.
    files = sorted(file for file in model.path.iterdir() if file.suffix in _WEIGHTS)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return fingerprint([model.revision, stats])


def _given(compare: Sequence[str], without: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    mistakes = []
    for item in compare:
        name, equals, source = item.partition("=")
        if not equals or not name or not source:
            mistakes.append(f"compare: found {item}, expected NAME=FOLDER_OR_HUB_ID")
        elif name == "student" or name in given:
            mistakes.append(f"compare: {name}: there is one already, expected another name")
        given[name] = source
    known = [*_OWN, *given]
    mistakes += [
        f"without: found {name}, expected one of {', '.join(known)}{suggestion(name, known)}"
        for name in without
        if name not in known
    ]
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    return given


def _own(name: str, output_dir: Path) -> tuple[str, str | None] | DistillError | None:
    """Return where one of a run's own models is; None where the run has none."""
    if name == "control":
        # As `make distill` lays them out.
        folder = output_dir.parent / "control"
        is_one = (
            folder.resolve() != output_dir.resolve() and (folder / "model/config.json").exists()
        )
        return (str(folder / "model"), None) if is_one else None
    if name == "before" and (output_dir / "init/config.json").exists():
        return str(output_dir / "init"), None
    try:
        settings = read_config_file(str(output_dir / "config.yaml"))
        if name == "before":
            student = settings.get("student", {})
            return str(student["model"]), student.get("revision")
        teacher = _teacher(str(settings["cache_dir"]))
    except DistillError as error:
        return error
    except KeyError as error:
        return ModelError(f"{output_dir / 'config.yaml'}: says no {error}")
    # Folders and the embedded teacher have digests instead of a commit.
    revision = str(teacher["revision"])
    return str(teacher["model"]), None if ":" in revision else revision


def _teacher(cache_url: str) -> dict[str, Any]:
    from pipeline.storage import Store

    try:
        manifest = json.loads(Store(cache_url).read("_meta/manifest.json"))
        return dict(manifest["identity"]["teacher"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise ModelError(f"{cache_url}: no complete cache, which would name the teacher") from None
