"""A model's local files, as `resolve.py` finds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["EMBEDDED", "ResolvedModel"]

EMBEDDED = "embedded"
"""The name of the teacher that every machine can have (`embedded.py`)."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Local files of a model."""

    name: str
    """As the user wrote it."""
    path: Path
    """Folder that transformers and vLLM load."""
    revision: str
    """Commit of the hub, or a digest of the folder's content."""

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine as a whole, as hub ids need not be."""
        return self.name == EMBEDDED or Path(self.name).expanduser().is_dir()

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))
