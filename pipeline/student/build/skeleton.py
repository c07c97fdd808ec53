"""The student without its weights: the model of its config, pruned as the run will prune it."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.load import with_first_attention
from pipeline.student.build.prune import pruned_config
from pipeline.student.forward.attention import fit_attention, make_known
from pipeline.student.settings.student import StudentSettings

__all__ = ["build_skeleton"]

_log = logging.getLogger(__name__)


def build_skeleton(
    folder: Path,
    settings: StudentSettings,
    *,
    dtype: str,
    order: tuple[str, ...] = ("sdpa", "eager"),
) -> Any | None:
    """Return the student on the meta device: parameters with names and shapes, of no memory.

    Args:
        folder: of the model that the student starts from.
        settings: its layers and remote code.
        dtype: `float32`, `bfloat16` or `float16`.
        order: of `attention_order`.

    Returns:
        None, with a warning, where the model's own code wants numbers while it is built.

    Raises:
        ConfigError: a layer to keep that the model does not have.
        ModelError: transformers does not know the architecture, or not with this attention.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = settings.trust_remote_code
    make_known(order)
    try:
        with tempfile.TemporaryDirectory() as place:
            config = AutoConfig.from_pretrained(
                _config_folder(folder, settings, Path(place)), trust_remote_code=trust
            )
            with torch.device("meta"):
                model = with_first_attention(
                    lambda name: AutoModelForCausalLM.from_config(
                        config,
                        dtype=getattr(torch, dtype),
                        attn_implementation=name,
                        trust_remote_code=trust,
                    ),
                    order,
                )
            fit_attention(model, order)
            return model
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{folder}: transformers cannot load it ({_reason(error)})",
            expected="a causal language model",
        ) from error
    except RuntimeError as error:
        _log.warning(
            "%s cannot be built without its weights (%s): names of parameters are checked once "
            "they are loaded",
            folder, _reason(error),
        )  # fmt: skip
        return None


def _config_folder(folder: Path, settings: StudentSettings, place: Path) -> Path:
    """Return a folder with the config of the pruned student and the code that it may bring."""
    if settings.keep_layers is None:
        return folder
    config = pruned_config(folder, settings.keep_layers)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in folder.glob("*.py"):
        shutil.copyfile(file, place / file.name)
    return place


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
