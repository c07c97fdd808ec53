"""Build the wheel: the library and the stages as one package, `offline_distill`.

A checkout has the packages `pipeline` and `stages` at its top, whose names many projects have. In
the wheel they are `offline_distill.pipeline` and `offline_distill.stages`: their import statements
are rewritten in a copy, which setuptools then builds. Names of modules elsewhere come from
`pipeline.program.module_name`, so nothing else needs to change. An editable installation is
setuptools' own, with the checkout's names.

The in-tree build backend of PEP 517; it imports nothing of the project.
"""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable",
    "get_requires_for_build_sdist", "get_requires_for_build_wheel", "rewrite_imports",
]  # fmt: skip

build_editable = build_meta.build_editable
build_sdist = build_meta.build_sdist
get_requires_for_build_editable = build_meta.get_requires_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel

PACKAGE = "offline_distill"
_PARTS = ("pipeline", "stages")
_ONLY_IN_A_CHECKOUT = shutil.ignore_patterns(
    "__pycache__", "locks", "build_backend.py", "options.py", "setup_env.py", "decisions", "*.png"
)
_INIT = '''"""Offline distillation of large language models: see `{package}.pipeline`."""

from {package}.pipeline import __all__, __dir__, __getattr__, __version__

__all__ = list(__all__)
'''


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, object] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel of the renamed copy; return the file's name."""
    target, root = Path(wheel_directory).resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy(root, copy)
        with _working_in(copy):
            return str(build_meta.build_wheel(str(target), config_settings))


def _copy(root: Path, copy: Path) -> None:
    package = copy / PACKAGE
    for part in _PARTS:
        shutil.copytree(root / part, package / part, ignore=_ONLY_IN_A_CHECKOUT)
    for file in package.rglob("*.py"):
        file.write_text(rewrite_imports(file.read_text(encoding="utf-8")), encoding="utf-8")
    (package / "__init__.py").write_text(_INIT.format(package=PACKAGE), encoding="utf-8")
    shutil.copy(root / "pipeline/py.typed", package)
    for name in ("README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    text = (root / "pyproject.toml").read_text(encoding="utf-8").split("[tool.ruff]", 1)[0]
    for old, new in (
        ('build-backend = "build_backend"', 'build-backend = "setuptools.build_meta"'),
        ('backend-path = ["stages"]\n', ""),
        ('= "stages.', f'= "{PACKAGE}.stages.'),
        ('= "pipeline.', f'= "{PACKAGE}.pipeline.'),
        ('include = ["pipeline*", "stages*"]', f'include = ["{PACKAGE}*"]'),
        ("\npipeline = [", f'\n"{PACKAGE}.pipeline" = ['),
        ("\nstages = [", f'\n{PACKAGE} = ["py.typed"]\n"{PACKAGE}.stages" = ['),
    ):
        if old not in text:
            raise SystemExit(f"pyproject.toml: {old!r} is not there; correct build_backend.py")
        text = text.replace(old, new)
    (copy / "pyproject.toml").write_text(text, encoding="utf-8")


def rewrite_imports(text: str) -> str:
    """Return a module's text with its imports of the two packages taken from the wheel's.

    Raises:
        SystemExit: `import pipeline.x`, which binds the name `pipeline`.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(
            alias.name.split(".", 1)[0] in _PARTS for alias in node.names
        ):
            raise SystemExit(f"line {node.lineno}: expected `from ... import ...` instead")
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and node.module is not None
            and node.module.split(".", 1)[0] in _PARTS
        ):
            line = lines[node.lineno - 1]
            before, after = line[: node.col_offset], line[node.col_offset :]
            changed = after.replace(f"from {node.module}", f"from {PACKAGE}.{node.module}", 1)
            lines[node.lineno - 1] = before + changed
    return "".join(lines)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
