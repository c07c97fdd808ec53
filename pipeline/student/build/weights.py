"""What a model folder's weight files say of themselves: names and shapes, without the weights."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import ModelError

__all__ = ["tensor_shapes"]

_INDEX = "model.safetensors.index.json"


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of every tensor by its name; reads the headers alone.

    Returns:
        None where the weights are in another format than safetensors, which has no such header.

    Raises:
        ModelError: no weights, a file of the index is missing, or one is damaged or too short.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    missing = sorted(_indexed(folder) - {file.name for file in files})
    if missing:
        raise ModelError(
            f"{folder}: {', '.join(missing)} missing, which {_INDEX} names",
            expected="all files of the weights",
            do="copy or download the model again",
        )
    if not files:
        if any(folder.glob("*.bin")):
            return None
        raise ModelError(
            f"{folder}: no safetensors files", expected="weights as save_pretrained writes"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(reader.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder}: transformers cannot load it ({file.name}: {error})",
                expected="a complete file of weights",
                do="copy or download the model again",
            ) from None
    return shapes


def _indexed(folder: Path) -> set[str]:
    """Return the files that the folder's index names; none where it has no index."""
    try:
        return set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder}/{_INDEX}: not readable ({error})", expected="the index of the weight files"
        ) from None
