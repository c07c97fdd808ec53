"""A model's name to local files and a revision that identifies the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from pipeline.config.nearest import beside, did_you_mean
from pipeline.errors import ModelError
from pipeline.models.resolved import EMBEDDED, ResolvedModel

__all__ = [
    "most_positions", "read_model_config", "resolve_model", "text_config", "with_weights",
]  # fmt: skip

_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.py"]
_WEIGHTS = ["*.safetensors"]
_STUDENT = "model"
"""In the output folder of a training, the student."""
_READ_WHOLE = 4 << 30
_DIGEST_BLOCK = 8 << 20
_DIGEST_PART, _DIGEST_PARTS = 64 << 10, 1024
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Of models of several parts; transformers' own name first."""


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    role: str,
    weights: bool = True,
    download: bool = True,
) -> ResolvedModel:
    """Return local files of `name`, downloading from the hub where it is a hub id.

    Args:
        name: `embedded`, a local folder, or a hub id.
        revision: branch, tag or commit of a hub id; None for its main branch.
        role: `teacher` or `student`, for messages.
        weights: whether a hub id's weights are fetched too; a tokenizer and a config need none.
        download: False takes a hub id only where its files are on this machine already.

    Raises:
        ModelError: no model of that name can be reached, or it is not a causal language model.
    """
    if name == EMBEDDED:
        from pipeline.models.embedded import embedded_model

        resolved = embedded_model()
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        resolved = ResolvedModel(name=name, path=folder, revision=_folder_digest(folder))
    else:
        resolved = _from_hub(name, revision, role, weights=weights, download=download)
    _check_causal(resolved, role)
    return resolved


def with_weights(model: ResolvedModel, role: str) -> ResolvedModel:
    """Return a model that was resolved without its weights, with them.

    Raises:
        ModelError: the hub cannot be reached any more.
    """
    if model.is_local:
        return model
    return _from_hub(model.name, model.revision, role, weights=True, download=True)


def most_positions(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens of a sequence that a model's config.json allows; None: any number."""
    inner = text_config(config)
    found = inner.get("max_position_embeddings") or inner.get("n_positions")
    return int(found) if found else None


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return config.json as a mapping; the text part of a model of several is complete.

    Raises:
        ModelError: there is none, or it is not JSON.
    """
    try:
        data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = folder / _STUDENT
        raise ModelError(
            f"{folder}: no config.json",
            expected="a model folder as save_pretrained writes it",
            do=f"did you mean {inside}?" if (inside / "config.json").is_file() else "",
        ) from None
    except ValueError as error:
        raise ModelError(f"{folder}/config.json: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ModelError(
            f"{folder}/config.json: holds no mapping", expected="a model's configuration"
        )
    return _with_defaults(data)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a model's config.json that describes its language model.

    Args:
        config: as `read_model_config` returns it.
    """
    for name in _TEXT_PARTS:
        if isinstance(config.get(name), Mapping):
            return config[name]  # type: ignore[no-any-return]
    return config


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a config leaves to its class: Gemma 3 says no vocabulary, 4B no heads either.

    Resolved as transformers does, which knows a model's text part by whatever name.
    """
    inner = text_config(config)
    if "vocab_size" in inner:
        return config
    from transformers import AutoConfig

    try:
        full = AutoConfig.for_model(**config).get_text_config().to_dict()
    except Exception:  # a model whose code comes with it; what lacks is said where it is used
        return config
    if inner is config:
        return {**config, "text_config": full}
    return {**config, "text_config": {**full, **inner}}


def _from_hub(
    name: str, revision: str | None, role: str, *, weights: bool, download: bool
) -> ResolvedModel:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{role} {name!r}: no such folder",
            expected="a folder with config.json, or a hub id",
            do=did_you_mean(name, beside(name)),
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        files = [*_FILES, *_WEIGHTS] if weights else _FILES
        path = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, local_files_only=not download
            )
        )
    except HFValidationError:
        raise ModelError(
            f"{role} {name!r}: neither a folder nor a hub id",
            expected="for example Qwen/Qwen2-1.5B",
        ) from None
    except LocalEntryNotFoundError as error:
        if download:
            raise _unreachable(name, role, error) from None
        raise ModelError(
            f"{role} {name!r}: not on this machine",
            expected="its files in the hub's cache",
            do=f"download it with `hf download {name}`",
        ) from None
    except Exception as error:
        # The hub's client raises a dozen exceptions (connection, gated, unknown, offline): to the
        # user they are one error, and the message contains the reason.
        raise _unreachable(name, role, error) from None
    # A snapshot's folder is named by its commit.
    return ResolvedModel(name=name, path=path, revision=path.name)


def _unreachable(name: str, role: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"{role} {name!r}: cannot be fetched from the hub ({reason})",
        expected="a folder on this machine, a reachable hub id, or `embedded`",
        do="check the name, the network, and HF_TOKEN for a gated model",
    )


def _folder_digest(folder: Path) -> str:
    """Digest of names, sizes and contents; of folders above 4 GiB only parts of the large files.

    Two trainings of one student differ neither in size nor in parts that are frozen, and the
    embeddings are often frozen and come first. Reading 140 GB of weights for a digest would cost
    minutes at every start: a large file is read in 1,024 places, some in every layer.
    """
    digest = hashlib.sha256()
    files = [
        (file, file.stat().st_size)
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors", ".model", ".jinja") and file.is_file()
    ]
    all_of_it = sum(size for _, size in files) <= _READ_WHOLE
    for file, size in files:
        digest.update(f"{file.name}:{size}\n".encode())
        content = xxh3_128()
        with file.open("rb") as stream:
            if all_of_it or size <= _DIGEST_PART * _DIGEST_PARTS:
                while block := stream.read(_DIGEST_BLOCK):
                    content.update(block)
            else:
                for part in range(_DIGEST_PARTS):
                    stream.seek(part * (size - _DIGEST_PART) // (_DIGEST_PARTS - 1))
                    content.update(stream.read(_DIGEST_PART))
        digest.update(content.digest())
    return f"sha256:{digest.hexdigest()[:32]}"


def _check_causal(model: ResolvedModel, role: str) -> None:
    config = read_model_config(model.path)
    architectures = config.get("architectures") or []
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    encodes = config.get("is_encoder_decoder", False)  # T5 and BART are ...ForConditionalGeneration
    if encodes or not any(str(name).endswith(causal) for name in architectures):
        found = ", ".join(map(str, architectures)) or "no architecture"
        raise ModelError(
            f"{role} {model.name!r}: its config.json names {found}",
            expected="a causal language model (an architecture that ends in ForCausalLM)",
        )
