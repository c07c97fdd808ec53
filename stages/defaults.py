"""The embedded default: settings of a run that names no model and no data set of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config import Command, DefaultFile
from pipeline.data.mixture.settings import cache_text, cache_urls, read_cache_dir
from pipeline.errors import ConfigError, StoreError

__all__ = ["STUDENT_DEFAULT", "TEACHER_DEFAULT", "report_student_default", "report_teacher_default"]

_CONFIGS = Path(__file__).parent / "configs"
_log = logging.getLogger(__name__)


def _is_embedded(data: Mapping[str, Any]) -> bool:
    """Return whether the cache is the embedded default's, or not there yet."""
    cache_dir = data.get("cache_dir", StudentRun.model_fields["cache_dir"].default)
    try:
        urls = cache_urls(read_cache_dir(cache_dir))
    except (ValueError, TypeError, AttributeError):
        return True  # others say what is wrong with it
    return all(
        told is None
        or (
            told.get("teacher", {}).get("model") == "embedded"
            and told.get("corpus", {}).get("source") == "embedded"
        )
        for told in map(_cache_identity, urls)
    )


def _cache_identity(url: str) -> dict[str, Any] | None:
    from pipeline.storage import Store

    with suppress(StoreError, FileNotFoundError, ValueError, KeyError, TypeError):
        return dict(json.loads(Store(url).read("_meta/manifest.json"))["identity"])
    return None  # others say what is wrong with it


TEACHER_DEFAULT = DefaultFile(
    str(_CONFIGS / "teacher.yaml"), unless=("teacher.model", "corpus.dataset_name")
)
STUDENT_DEFAULT = DefaultFile(
    str(_CONFIGS / "student.yaml"), unless=("student.model",), fits=_is_embedded
)


def report_teacher_default(command: Command[Any]) -> None:
    """Say what a run takes from the embedded default, or that half of it is named."""
    run: TeacherRun = command.settings
    if command.default_file is not None:
        _log.info(
            "neither a teacher nor a data set is named: the embedded default (%s), %s rows of at "
            "most %d tokens", _shown(command.default_file), run.corpus.num_samples or "all",
            run.corpus.longest,
        )  # fmt: skip
    elif "corpus.dataset_name" not in command.given:
        _log.warning("no data set is named (--dataset_name): the teacher reads the embedded text")
    elif "teacher.model" not in command.given:
        _log.warning("no teacher is named (--teacher_model): the embedded one reads")


def report_student_default(command: Command[StudentRun]) -> None:
    """Say that a run takes the embedded default.

    Raises:
        ConfigError: the cache is another teacher's or text's, and no student is named.
    """
    run = command.settings
    if command.default_file is not None:
        _log.info("no student is named: the embedded default (%s)", _shown(command.default_file))
    elif "student.model" not in command.given:
        told = [_cache_identity(url) or {} for url in cache_urls(run.cache_dir)]
        teachers = [str(one.get("teacher", {}).get("model")) for one in told]
        raise ConfigError(
            "student.model: not named",
            expected=f"a student for the cache {cache_text(run.cache_dir)}, made by "
            f"{' + '.join(dict.fromkeys(teachers))}",
            do="give --student_model NAME_OR_FOLDER, or --config stages/configs/student.yaml for "
            "ten layers of the embedded teacher",
        )


def _shown(path: str) -> str:
    with suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path
