"""`import`: its flags to an import, with all mistakes in them at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import yaml

from pipeline.cache.codec.spec import MAX_VOCAB_SIZE
from pipeline.cache.tools.derive import check_apart
from pipeline.cache.tools.foreign.distillkit import Compression
from pipeline.cache.tools.foreign.files import list_files
from pipeline.cache.tools.foreign.formats import FORMATS
from pipeline.cache.tools.foreign.importing import ImportSpec, import_files
from pipeline.cache.tools.foreign.tokenizer import read_tokenizer
from pipeline.errors import ConfigError
from pipeline.storage import Store

__all__ = ["run_import"]

_Progress = Callable[[int], None]
_BESIDE = "compression_config.yaml"


def run_import(
    options: argparse.Namespace, *, command: str, on_start: _Progress, on_rows: _Progress
) -> str:
    """Import files; return the last lines.

    Raises:
        ConfigError: flags that are missing or do not fit, all of them.
        CacheError: as `import_files`.
        StoreError: as this.
    """
    target = Store(options.target)
    mistakes: list[str] = []
    tokenizer = None
    if not options.tokenizer:
        mistakes.append(
            "--tokenizer: found none, expected the folder or address of the model whose tokenizer "
            "made the ids, such as hf://owner/name"
        )
    else:
        try:
            tokenizer = read_tokenizer(options.tokenizer)
        except ValueError as error:
            mistakes.append(f"--tokenizer: {error}")
    vocab_size = options.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    if tokenizer is not None and vocab_size is None:
        mistakes.append(
            "--vocab-size: found none, and no config.json beside the tokenizer, expected the rows "
            "of the teacher's head"
        )
    if vocab_size is not None and not 1 < vocab_size <= MAX_VOCAB_SIZE:
        mistakes.append(f"--vocab-size: found {vocab_size}, expected 2 to {MAX_VOCAB_SIZE}")
    renamed = _renamed(options, mistakes)
    compression = _compression(options, mistakes)
    if mistakes:
        raise ConfigError(mistakes=mistakes)
    assert tokenizer is not None
    assert vocab_size is not None
    files = list_files(options.source, renamed)
    check_apart(target, [files[0].store])
    manifest, outside = import_files(
        files,
        target,
        ImportSpec(
            options.format, tokenizer, vocab_size, options.teacher, options.heldout_fraction,
            options.shard_tokens, compression,
        ),
        command=command,
        on_start=on_start,
        on_rows=on_rows,
    )  # fmt: skip
    total = manifest.total()
    unknown = "; ".join(manifest.identity["imported"]["unknown"])
    return (
        f"{options.target}: {total.rows} rows of {len(files)} files, for temperature 1 alone\n"
        f"not known: {unknown}\n"
        f"labels outside the entries: {outside} of {total.loss_tokens}"
    )


def _renamed(options: argparse.Namespace, mistakes: list[str]) -> dict[str, str]:
    layout = FORMATS[options.format]
    known = {**layout.required, **layout.optional}
    renamed = {}
    for pair in (options.columns or "").split(","):
        if not pair.strip():
            continue
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (equals and theirs) or ours not in known:
            mistakes.append(
                f"--columns: found {pair.strip()!r}, expected OURS=THEIRS with one of "
                f"{', '.join(known)}"
            )
        renamed[ours] = theirs
    return renamed


def _compression(options: argparse.Namespace, mistakes: list[str]) -> Compression | None:
    if not FORMATS[options.format].packed:
        if options.compression:
            mistakes.append(
                f"--compression: found it with --format {options.format}, expected it with "
                "distillkit alone"
            )
        return None
    place = options.compression
    if place is None:
        folder, name = options.source, _BESIDE
        if folder.endswith(".parquet"):
            folder = folder.rpartition("/")[0] or "."
    else:
        folder, _, name = place.rpartition("/")
    try:
        raw = Store(folder or ("/" if str(place).startswith("/") else ".")).read(name)
        return Compression.read(yaml.safe_load(raw))
    except FileNotFoundError:
        mistakes.append(
            f"--compression: found no {place or f'{_BESIDE} beside the files'}, expected the file "
            "by which DistillKit has compressed them"
        )
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        mistakes.append(f"--compression: {place or _BESIDE}: {lines[0]}")
    return None
