"""A run's configuration for a job: checked by the stage's own schema, its paths on the volume."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pipeline.amounts import format_bytes
from pipeline.config import Settings, dump_yaml, parse_command
from pipeline.errors import ConfigError

__all__ = ["CONFIG_FOLDER", "STAGES", "RunConfig", "Stage", "resolve_config"]

Stage = Literal["cache-teacher", "train-student"]
STAGES: tuple[Stage, ...] = ("cache-teacher", "train-student")
CONFIG_FOLDER = "/etc/distill"

# Paths of a stage that belong on the volume: section, field, name in the run's folder. A value left
# at the schema's default means "the run's own".
_PATHS = {
    "cache-teacher": ((None, "cache_dir", "cache"), ("corpus", "prepared", "corpus")),
    "train-student": ((None, "cache_dir", "cache"), ("output", "output_dir", "student")),
}
# Fields that may name a folder or file to read; the pods see only the volume.
_READ = {
    "cache-teacher": (("teacher", "model"), ("corpus", "dataset_name")),
    "train-student": (("student", "model"),),
}
# Fields that may name a small file of this machine, which travels with the configuration, and its
# kinds. A configuration of somebody else's must not carry away whatever its reader can read.
_CARRIED = {
    "cache-teacher": (("corpus", "chat_template", (".jinja", ".jinja2", ".j2")),),
    "train-student": (("student", "layers_to_unfreeze", (".yaml", ".yml")),),
}
_LARGEST_CARRIED = 256 * 2**10
"""Bytes; a ConfigMap holds 1 MiB."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The resolved configuration of one stage of one run."""

    settings: Settings
    files: dict[str, str]
    """Content of the ConfigMap: `config.yaml` and what it names."""


def stage_model(stage: Stage) -> type[Settings]:
    """Return the settings class of a stage, imported when it is needed."""
    if stage == "cache-teacher":
        from pipeline.api.settings import TeacherRun

        return TeacherRun
    from pipeline.api.settings import StudentRun

    return StudentRun


def resolve_config(
    stage: Stage,
    *,
    run: str,
    volume: str,
    config: str | None = None,
    default: str = "",
    flags: Sequence[str] = (),
    metrics_port: int | None = None,
) -> RunConfig:
    """Resolve files and flags as the stage would, and put its paths on the volume.

    Args:
        stage: which stage.
        run: name of the run; its folder is `<volume>/runs/<run>`.
        volume: mount path of the shared volume in the pods.
        config: a configuration file; None takes `default`.
        default: the overlay's own configuration, YAML. Its paths belong to the run `default`, so
            they give way to this run's.
        flags: as on the stage's command line, above the file.
        metrics_port: of the pods, where the configuration names none (0 there: off).

    Raises:
        ConfigError: what the stage itself would reject, or a path that is not on the volume.
    """
    model = stage_model(stage)
    with tempfile.TemporaryDirectory() as folder:
        path = config
        if path is None:
            file = Path(folder) / f"{stage}-config.yaml"
            file.write_text(default, encoding="utf-8")
            path = str(file)
        command = parse_command(
            model,
            ["--config", path, *flags],
            prog=f"make {stage}",
            description="",
            elsewhere={f"make {other}": stage_model(other) for other in STAGES if other != stage},
        )
    data = command.settings.model_dump(mode="json")
    if metrics_port is not None and data["observe"]["prometheus_port"] is None:
        data["observe"] |= {"prometheus_port": metrics_port, "prometheus_host": "0.0.0.0"}
    mistakes: list[str] = []
    for section, field, name in _PATHS[stage]:
        holder = data if section is None else data[section]
        if holder[field] is None:
            continue
        dotted = field if section is None else f"{section}.{field}"
        own = f"{volume}/runs/{run}/{name}"
        defaults = {f"runs/default/{name}"}
        if config is None:
            defaults.add(f"{volume}/runs/default/{name}")
        if isinstance(holder[field], list):  # a mixture of caches
            for share in holder[field]:
                share["url"] = _on_volume(dotted, share["url"], volume, mistakes)
            continue
        value = str(holder[field])
        holder[field] = own if value in defaults else _on_volume(dotted, value, volume, mistakes)
    for section, field in _READ[stage]:
        named = str(data[section][field])
        if named.startswith(("/", "~")):
            _on_volume(f"{section}.{field}", named, volume, mistakes)
        elif ".." in PurePosixPath(named).parts:
            mistakes.append(f"{section}.{field}: found {named}, expected a name without `..`")
    if stage == "train-student" and data["output"]["save_location"] in ("hub", "both"):
        mistakes.append(
            f"output.save_location: found {data['output']['save_location']}, expected fsx: the "
            "training pods see no hub token; push the finished student with `make push-student`"
        )
    carried: dict[str, str] = {}
    for section, field, kinds in _CARRIED[stage]:
        value = data[section][field]
        if value and "\n" not in value and len(value) < 1024 and Path(value).is_file():
            file = Path(value)
            # What is given as a flag was chosen by who gives it.
            by_flag = any(word == value or word.endswith(f"={value}") for word in flags)
            home = None if by_flag or config is None else Path(config).resolve().parent
            reason = _not_carried(file, kinds, home)
            if reason:
                mistakes.append(f"{section}.{field}: found {value}, {reason}")
                continue
            carried[file.name] = file.read_text(encoding="utf-8")
            data[section][field] = f"{CONFIG_FOLDER}/{file.name}"
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    settings = model.model_validate(data)
    return RunConfig(
        settings=settings,
        files={"config.yaml": dump_yaml(settings), **carried},
    )


def _not_carried(file: Path, kinds: Sequence[str], home: Path | None) -> str:
    """Return why a file must not travel into a ConfigMap; empty where it may."""
    real = file.resolve()
    if file.suffix.lower() not in kinds or real.suffix.lower() not in kinds:
        return f"expected a file that ends in {' or '.join(kinds)}"
    if home is not None and not real.is_relative_to(home):
        return f"expected a file below the configuration's folder, {home}, or its name as a flag"
    if real.stat().st_size > _LARGEST_CARRIED:
        return f"expected a file of at most {format_bytes(_LARGEST_CARRIED)}"
    try:
        real.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "expected a text in UTF-8 that can be read"
    return ""


def _on_volume(field: str, value: str, volume: str, mistakes: list[str]) -> str:
    path = PurePosixPath(value)
    if not path.is_absolute() and "://" not in value and not value.startswith("~"):
        path = PurePosixPath(volume) / path
    if "://" in value or ".." in path.parts or not path.is_relative_to(volume):
        mistakes.append(
            f"{field}: found {value}, expected a path on the volume, such as {volume}/runs/NAME"
        )
    return str(path)
