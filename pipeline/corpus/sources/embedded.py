"""Text that every Python installation contains: the language reference, and docstrings as chats."""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import inspect
import json
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.corpus.sources.rows import Piece, Row, even_pieces
from pipeline.errors import CorpusError

__all__ = ["EMBEDDED_NAME", "EmbeddedSource", "embedded_source"]

EMBEDDED_NAME = "embedded"

_MIN_CHARS = 40
_MAX_CHARS = 1200

# Only parsed, never imported, so none of their code runs. Missing modules are skipped.
_MODULES = (
    "_collections_abc _py_abc _pydatetime _pydecimal _pyio _strptime _threading_local "
    "__future__ abc aifc ast asynchat asyncio asyncore base64 bdb bisect bz2 calendar cgitb "
    "chunk cmd code codecs codeop collections colorsys compileall concurrent configparser "
    "contextlib copy ctypes curses datetime dbm difflib dis doctest email filecmp fileinput "
    "fnmatch fractions ftplib functools genericpath getopt getpass glob graphlib gzip heapq "
    "hmac http imaplib importlib inspect io ipaddress json keyword linecache logging lzma "
    "mailcap mimetypes nntplib ntpath numbers operator optparse os pathlib pdb pickletools "
    "pipes pkgutil platform poplib posixpath profile pstats pty py_compile pyclbr queue quopri "
    "random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil site smtpd "
    "smtplib sndhdr socket socketserver sqlite3 ssl statistics string subprocess sunau symtable "
    "sysconfig tabnanny tarfile telnetlib tempfile textwrap threading timeit tokenize traceback "
    "tracemalloc types typing unittest urllib venv warnings wave weakref wsgiref xml xmlrpc "
    "zipapp zipfile zipimport "
)

# Implementation modules by their public name.
_PUBLIC_NAME = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}

_QUESTIONS = {
    "class": (
        "What is {name} for?",
        "Explain the class {name} of Python's standard library.",
        "What does the class {name} represent?",
        "How is {name} described in Python's documentation?",
    ),
    "function": (
        "What does {name} do?",
        "Explain {name} in Python.",
        "How do I use {name}?",
        "What is the purpose of {name}({arguments})?",
        "Describe the function {name}({arguments}) of Python's standard library.",
    ),
}


@functools.cache
def embedded_source(kinds: Literal["both", "chats", "documents"] = "both") -> EmbeddedSource:
    """Build documents from `pydoc_data.topics` and module docstrings, chats from other docstrings.

    Rows are ordered by a hash of their key, so that any first N rows contain both kinds. No text
    occurs twice: a passage both trained on and held out would make the student look better.

    Parsing Python's modules takes seconds, so the rows are kept; nobody changes them.

    Raises:
        CorpusError: this Python was installed without the sources or the topics.
    """
    seen: set[str] = set()
    rows: list[Row] = []
    with _without_collection():
        trees = list(_parse_modules())
    if kinds != "chats":
        rows += [_row(key, {"text": text}) for key, text in _documents(trees, seen)]
    if kinds != "documents":
        rows += [_row(key, {"messages": chat}) for key, chat in _chats(trees, seen)]
    if not rows:
        raise CorpusError(
            "the embedded text is empty: this Python has neither the sources of its standard "
            "library nor pydoc_data",
            do="install Python's full standard library, or give --dataset_name a dataset or folder",
        )
    rows.sort(key=lambda row: (hashlib.blake2b(row.key.encode()).digest(), row.key))
    digest = hashlib.sha256(json.dumps([[row.key, row.data] for row in rows]).encode()).hexdigest()
    identity = {"kinds": kinds, "python": platform.python_version(), "text_sha256": digest}
    return EmbeddedSource(rows, identity)


@dataclass(frozen=True, slots=True)
class EmbeddedSource:
    """The embedded text, in memory; satisfies `RowSource`."""

    rows: list[Row]
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """`embedded`."""
        return EMBEDDED_NAME

    @property
    def total(self) -> int | None:
        """The rows."""
        return len(self.rows)

    @property
    def mixed(self) -> bool:
        """Yes: documents and chats."""
        return True

    def pieces(self, size: int) -> Iterator[Piece]:
        """Divide the rows evenly."""
        held = sum(len(str(row.data)) for row in self.rows)
        return even_pieces(len(self.rows), held, size)

    def read(self, piece: Piece) -> Iterator[Row]:
        """Yield the rows of a piece."""
        yield from self.rows[piece.start : piece.stop]

    def count(self, piece: Piece, at_most: int) -> int:
        """Return the rows of a piece."""
        return min(piece.stop - piece.start, at_most)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Let Python's collector rest: it goes through all trees again and again, and all are kept."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _row(key: str, data: dict[str, Any]) -> Row:
    return Row(key=key, place=f"embedded {key}", data=data)


def _parse_modules() -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in _MODULES.split():
        files = [root / f"{module}.py"]
        if (root / module).is_dir():
            files = sorted((root / module).rglob("*.py"))
        for file in files:
            parts = list(file.relative_to(root).with_suffix("").parts)
            if {"test", "tests", "__main__", "site-packages"} & set(parts) or not file.is_file():
                continue
            if parts[-1] == "__init__":
                parts.pop()
            parts[0] = _PUBLIC_NAME.get(parts[0], parts[0])
            # `concurrent.futures._base.Future` is known as `concurrent.futures.Future`.
            public = [part for part in parts if not part.startswith("_")]
            yield ".".join(public or parts), ast.parse(file.read_bytes())


def _documents(trees: list[tuple[str, ast.Module]], seen: set[str]) -> Iterator[tuple[str, str]]:
    numbers: Counter[str] = Counter()
    for title, text in [*_topics(), *((name, ast.get_docstring(tree)) for name, tree in trees)]:
        for passage in _passages(text or "", seen):
            yield f"document:{title}:{numbers[title]}", passage
            numbers[title] += 1


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [(f"topic {title}", topics[title]) for title in sorted(topics)]


def _passages(text: str, seen: set[str]) -> Iterator[str]:
    """Group paragraphs up to `_MAX_CHARS`, without the paragraphs seen before."""
    passage = ""
    for paragraph in (part.strip("\n") for part in text.split("\n\n")):
        if not paragraph or (len(paragraph) >= _MIN_CHARS and paragraph in seen):
            continue
        seen.add(paragraph)
        if passage and len(passage) + len(paragraph) > _MAX_CHARS:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    if len(passage) >= _MIN_CHARS:
        yield passage


def _chats(
    trees: list[tuple[str, ast.Module]], seen: set[str]
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    keys: set[str] = set()
    for module, tree in trees:
        for name, node in _definitions(tree.body, module):
            answer = _capped(inspect.cleandoc(ast.get_docstring(node) or "").strip())
            key = f"chat:{name}"
            if len(answer) < _MIN_CHARS or answer in seen or key in keys:
                continue
            seen.add(answer)
            keys.add(key)
            question = _question(name, node)
            yield (
                key,
                [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
            )


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, _Definition]]:
    for node in body:
        if isinstance(node, _Definition) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, name)


def _question(name: str, node: _Definition) -> str:
    choices = _QUESTIONS["class" if isinstance(node, ast.ClassDef) else "function"]
    arguments = "" if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
    choice = hashlib.blake2b(name.encode(), digest_size=8).digest()
    template = choices[int.from_bytes(choice, "big") % len(choices)]
    return template.format(name=name, arguments=arguments)


def _capped(text: str) -> str:
    """Shorten `text` to `_MAX_CHARS`: at a paragraph, or at a line of a long first paragraph."""
    if len(text) <= _MAX_CHARS:
        return text
    head = text[: _MAX_CHARS + 2]
    cut = head.rfind("\n\n")
    if cut < _MIN_CHARS:
        cut = head.rfind("\n")
    return head[:cut].rstrip() if cut >= _MIN_CHARS else text[:_MAX_CHARS].rstrip()
