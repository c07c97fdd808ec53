"""Make packages look as if they were not installed, in this process: `hide("vllm", "datasets")`."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["hide"]


class _Without:
    """A finder of modules and distributions that does not see some of them."""

    def __init__(self, finder: Any, hidden: frozenset[str]) -> None:
        self._finder = finder
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find nothing of a hidden package."""
        if name.split(".")[0] in self._hidden or not hasattr(self._finder, "find_spec"):
            return None
        return self._finder.find_spec(name, path, target)

    def find_distributions(self, *args: Any) -> Iterator[importlib.metadata.Distribution]:
        """Leave out the hidden distributions; the CPU build of vLLM has a name of its own."""
        find = getattr(self._finder, "find_distributions", None)
        for distribution in find(*args) if find else ():
            name = str(distribution.metadata["Name"]).replace("-", "_").removesuffix("_cpu")
            if name not in self._hidden:
                yield distribution


def hide(*packages: str) -> None:
    """Hide top-level packages from everything that is imported from here on."""
    loaded = [name for name in sys.modules if name.split(".")[0] in packages]
    assert not loaded, f"too late, already imported: {loaded}"
    sys.meta_path[:] = [_Without(finder, frozenset(packages)) for finder in sys.meta_path]
