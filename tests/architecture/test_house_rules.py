"""What every source file keeps to, and what the documents promise exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stage_runner import ROOT

SOURCES = sorted(
    file for part in ("pipeline", "stages", "k8s") for file in ROOT.glob(f"{part}/**/*.py")
)
LONGEST = 400
DOCUMENTS = [
    file
    for folder in (".", "pipeline/**", "stages/**", "k8s/**", "docker", "tests/**")
    for file in ROOT.glob(f"{folder}/*.md")
    if file.is_file()
]
NAMES = [file.relative_to(ROOT).as_posix() for file in SOURCES]


def _tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield public functions and classes, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("name", NAMES)
def test_a_source_file(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = _tree(name)
    lines = text.count("\n")
    assert lines <= LONGEST, f"{name} has {lines} lines: split it"
    if not text.strip():
        return
    assert ast.get_docstring(tree), f"{name} does not say what it is"
    silent = [what for what, node in _public(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not silent, f"{name}: no docstring on {', '.join(silent)}"


def test_no_test_file_shares_its_name() -> None:
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_print_in_the_library_but_where_it_is_the_product() -> None:
    """Results go to stdout from the stages and the forecasts; the rest is logged."""
    allowed = re.compile(
        r"stages/|k8s/|pipeline/(errors|config/command|cache/__main__|.*/estimate)\b"
    )
    for name in NAMES:
        calls = [
            node.lineno
            for node in ast.walk(_tree(name))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        ]
        assert not calls or allowed.match(name), f"{name} prints in lines {calls}"


def _targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z0-9-]*):", text, re.MULTILINE))


def test_every_make_target_that_is_named_exists() -> None:
    targets = _targets()
    assert {"distill", "cache-teacher", "train-student", "test", "test-all", "check"} <= targets
    sources = [*DOCUMENTS, *SOURCES, *(ROOT / "stages/configs").rglob("*.yaml"), ROOT / "Makefile"]
    unknown = {
        f"{file.relative_to(ROOT)}: make {name}"
        for file in sources
        # In code spans and indented blocks, not the English verb.
        for name in re.findall(
            r"(?:`|^\s{4,}|^\$ |^|: )make ([a-z]+(?:-[a-z]+)*)(?=[`\s]|$)",
            file.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        if name not in targets and not _is_english(file, name)
    }
    assert not unknown


def _is_english(file: Path, name: str) -> bool:
    """`make` opens a sentence of a message or a comment."""
    return file.suffix == ".py" and name in ("the", "it", "what", "a", "this", "one", "sure")


def test_every_target_says_what_it_does() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in _targets():
        assert re.search(rf"^{name}:.*## \S", text, re.MULTILINE), f"make help says nothing: {name}"
        assert re.search(rf"^\.PHONY:.*\b{name}\b", text, re.MULTILINE), f"{name} is not phony"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_local_link_leads_somewhere(file: Path) -> None:
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)]*))?\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = file.parent / link if link else file
        assert target.exists(), f"{file.name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{file.name}: {link}#{anchor}"


def _anchors(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as the usual renderers make them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_room_is_crowded() -> None:
    """A reader takes in some ten names at once; what holds more is several rooms."""
    for folder in sorted(
        {file.parent for file in SOURCES if file.is_relative_to(ROOT / "pipeline")}
    ):
        files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= 14, f"{folder.relative_to(ROOT)} holds {len(files)} files"


def test_every_room_stands_on_the_map_once() -> None:
    text = (ROOT / "pipeline/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\S )?`([a-z_/]+)/` \|[^|]*\|([^|]*)\|", text, re.MULTILINE)
    places = [place for place, _ in rows]
    assert len(places) == len(set(places))
    beside = {"config", "observe", "storage"}  # used by all, named below the table
    assert all(f"`{name}/`" in text for name in beside)
    found = {
        file.parent.relative_to(ROOT / "pipeline").as_posix()
        for file in (ROOT / "pipeline").rglob("__init__.py")
    }
    assert found - {"."} - beside == set(places)
    for place, first in rows:
        for name in re.findall(r"`([a-z_]+\.py|[A-Z]+\.md)`", first):
            assert (ROOT / "pipeline" / place / name).exists(), f"{place}: no {name}"


def test_every_flag_that_a_document_shows_exists() -> None:
    from pipeline.api.settings import StudentRun
    from pipeline.cache.tools.commands import _build
    from pipeline.config.fields import leaves
    from stages.distill import DistillRun
    from stages.eval_student import EvalRun
    from stages.preview import PreviewRun
    from stages.push_student import PushRun
    from stages.rounds import RoundsRun
    from stages.score_student import ScoreRun
    from stages.sweep import SweepRun

    known = {"preview", "config", "config_file", "dry_run", "check", "help", "retry_quarantined"}
    for model in (
        PreviewRun,
        StudentRun,
        DistillRun,
        EvalRun,
        PushRun,
        SweepRun,
        RoundsRun,
        ScoreRun,
    ):
        for leaf in leaves(model):
            known |= {leaf.dotted, leaf.flag or leaf.dotted}
    for command in _build()[1].values():
        flags = command._option_string_actions
        known |= {name.lstrip("-").replace("-", "_") for name in flags}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = re.compile(r"--([a-z][a-z0-9_.-]*)")
    foreign = {"nproc-per-node", "standalone", "nnodes"}  # the launchers' own
    foreign |= {"use_deepspeed", "num_processes", "multi_gpu", "cpu"}
    foreign |= {"shape"}  # a bench's
    foreign |= {"max-logprobs"}  # of vLLM's server
    for flag in ours.findall(text):
        name = flag.rstrip(".-").replace("-", "_")
        if flag.rstrip(".-") in foreign or name in {f.replace("-", "_") for f in foreign}:
            continue
        assert name in known or name.removeprefix("no_") in known, f"README.md shows --{flag}"


def test_the_page_of_options_is_what_the_settings_say() -> None:
    from stages.options import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run `make options`"
