"""No retired word of the glossary comes back: in names, flags, columns, members or documents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stage_runner import ROOT

GLOSSARY = ROOT / "pipeline/GLOSSARY.md"
SOURCES = sorted(
    file for part in ("pipeline", "stages", "k8s") for file in ROOT.glob(f"{part}/**/*.py")
)
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "pipeline/**/*.md", "stages/**/*.md", "k8s/*.md")
    for file in ROOT.glob(pattern)
    if file != GLOSSARY
)


@dataclass(frozen=True)
class Retired:
    """A word of the glossary's last column, and how its retired sense is recognised."""

    name: str
    """Regex on a name in snake case with an underscore at both ends."""
    prose: str
    """Regex on a document's text, in any case: phrases, since most words are ordinary English."""
    within: str = ""
    """Regex on the path of a source file; elsewhere the word in a name is ordinary English."""
    allowed: dict[str, str] | None = None
    """Regex on `path:name` to the reason why that name may have the word."""


RETIRED = {
    "counted": Retired(
        r"_(un)?counted_",
        r"\bcounted (tokens?|positions?|labels?)\b|\bnum_counted\b"
        r"|\btokens? (that|which) counts?\b",
    ),
    "the law": Retired(
        r"_laws?_", r"\b(the|its|their|own|same|sampling|inclusion) laws?\b(?! of large)"
    ),
    "certain": Retired(
        r"_certain_", r"(?<!\ba\s)\bcertain (entry|entries|ones|ids|runs?|counts?|values?)\b"
    ),
    "drawn": Retired(
        r"_drawn_",
        r"\bdrawn (entry|entries|ones|ids|tail|targets?|schemes?|cache|for T)\b"
        r"|\bentries (are|were|is|was) drawn\b|\bor drawn\b|^\| drawn \||\(drawn:",
        allowed={
            r"pipeline/sweeps/search\.py:drawn": "a point of the search, not an entry of a target",
        },
    ),
    "gold": Retired(
        r"_gold_",
        r"\bgold\b(?! standard)",
        allowed={r".*:gold_surprise": "a choice of loss.weight, by the name that users know"},
    ),
    "level": Retired(
        r"_levels?_",
        r"\b(quantisation|grid|stored|coded|8-bit|256) levels?\b",
        within=r"pipeline/(cache|sampling|loss|data|teacher/sparsify)/",
        allowed={
            r"pipeline/cache/io/parquet\.py:.*": "zstd's levels of compression",
            r".*:(compression_)?level": "the argument of a compressor",
            r".*:.*log_level": "the level of a log's messages",
        },
    ),
    "thin": Retired(
        r"_thin(s|ned|ning)?_",
        r"\bthin(s|ned|ning)?\b(?! (layer|line|wrapper|client))",
        allowed={r"pipeline/report/.*:_?thin(ned)?": "fewer points of a plotted line"},
    ),
    "set aside": Retired(r"_aside_", r"\bset(s|ting)? (\w+ )?aside\b|\brows? aside\b"),
    "poison": Retired(r"_poison(s|ed|ous)?_", r"\bpoison(s|ed|ous)?\b"),
    "unanswered": Retired(r"_unanswered_", r"\bunanswered\b"),
    "left out": Retired(
        r"_left_out_",
        r"\bshards? (that )?(\w+ ){0,3}left out\b|\bleft[- ]out (shard|row)s?\b"
        r"|\bleav(e|es|ing) (out )?(\w+ )?(damaged )?shards?( out)?\b",
    ),
    "claim": Retired(
        r"_claim(s|ed|er|ers|ing|board)?_",
        r"\bclaim(s|ed|ing)? (a |the |each |its |another )?(shards?|trials?|runs?)\b"
        r"|\b(shards?|trials?|runs?) (is|are|was|were) claimed\b|\bclaim (file|board|loop)s?\b"
        r"|_meta/claims",
        allowed={
            r"k8s/.*:(claims?|claimName|fsx-claim|.*[Vv]olumeClaim.*)": "Kubernetes' volume claims"
        },
    ),
    "breadcrumb": Retired(r"_breadcrumbs?_", r"\bbreadcrumbs?\b"),
    "cut": Retired(
        r"_cuts?_",
        r"\bcut (student|teacher|model|layer)s?\b"
        r"|\bcut(s|ting)? (the |a )?(student|model|layer)s?\b"
        r"|\bcut (down )?to \w+ layers\b",
        within=r"pipeline/(student|sweep)/|stages/",
        allowed={
            r".*:.*shard.*": "a plan cuts a corpus into shards",
            r".*:tokens_cut": "a row's tokens beyond its limit",
        },
    ),
    "repair": Retired(
        r"_repair(s|ed)?_",
        r"\brepair(s|ed|ing)? (the |a |of the )?(student|layer|model|projection)s?\b"
        r"|\b(student|layer)('s)? repair\b",
        within=r"pipeline/(student|sweep|data|loss)/|stages/",
    ),
    "deliver": Retired(
        r"_deliver(s|ed|y)?_",
        r"\bdeliver(s|ed|ing)? (the |a |its )?(\w+ )?(student|model|folder|weights)\b"
        r"|\bdelivery (of|folder)\b",
    ),
    "a world": Retired(
        r"_worlds?_(?!size_)",
        r"\b(a|one|whole|smaller|larger|same) worlds?\b(?! size)",
        allowed={r".*:read_amplification_world8": "a figure at a world size of 8"},
    ),
    "look": Retired(
        r"_looks?_",
        r"\b(a|the|first|quick) look\b(?! at)|\blook (job|pod)s?\b",
        within=r"k8s/|stages/",
    ),
    "kd": Retired(
        r"_kd_",
        r"`[\w./]*\bkd\b[\w./]*`|\bkd (term|loss|value)s?\b",
        allowed={
            r"pipeline/config/fields\.py:kd_(ratio|weight)": "what other trainers call it",
            r"pipeline/BENCHMARKS\.md:kd_(beta|normalize_topk)": "options of Axolotl",
        },
    ),
}  # fmt: skip

OLD_NAMES = {
    "layers_kept": "a name with `prune`",
}
"""Names that were retired with these words and contain none of them; each with its successor."""


def _glossary_words() -> set[str]:
    rows = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [re.split(r"\s*\|\s*", row.strip("| ")) for row in rows[2:]]
    last = [row.rstrip().rstrip("|").rsplit("|", 1)[1].strip() for row in rows[2:]]
    assert len(cells) == len(last)
    return {word.strip() for cell in last for word in cell.split(",") if word.strip()}


def _snake(name: str) -> str:
    """Return a name as `_lower_snake_case_`; dots and dashes of flags separate words too."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return f"_{'_'.join(part.lower() for part in parts)}_"


def _wrong_names(path: str, names: Iterator[str] | set[str]) -> list[str]:
    """Return `path: name (word)` for each name with a retired word, with the reason why."""
    found = set()
    for name in names:
        snake = _snake(name)
        for old, successor in OLD_NAMES.items():
            if f"_{old}_" in snake:
                found.add(f"{path}: {name} ({old}: use {successor})")
        for word, retired in RETIRED.items():
            if retired.within and path.endswith(".py") and not re.match(retired.within, path):
                continue
            if not re.search(retired.name, snake):
                continue
            if any(re.fullmatch(known, f"{path}:{name}") for known in retired.allowed or {}):
                continue
            found.add(f"{path}: {name} ({word})")
    return sorted(found)


def _names_of_source(text: str) -> Iterator[str]:
    """Yield identifiers, and texts that are one word: keys, columns, members, choices."""
    docstrings = {
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            yield token.string
        elif token.type == tokenize.STRING:
            value = ast.literal_eval(token.string) if token.string[0] in "'\"" else ""
            if value not in docstrings and re.fullmatch(r"-{0,2}[A-Za-z_][\w./-]*", value):
                yield value


def _keys(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key)
            yield from _keys(value)
    elif isinstance(data, list):
        for value in data:
            yield from _keys(value)


def _wrong_phrases(path: str, text: str) -> list[str]:
    """Return `path:line: phrase (word)` for each retired phrase; a phrase may cross a line end."""
    found = []
    for word, retired in RETIRED.items():
        pattern = retired.prose.replace(" ", r"\s+")
        for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            phrase = " ".join(match.group().split())
            found.append(f"{path}:{line}: {phrase} ({word})")
    return found


def _wrong_code_spans(path: str, text: str) -> list[str]:
    """Check flags and code spans of a document, where names of the program stand."""
    spans = re.findall(r"`([^`\n]+)`", text)
    names = {name for span in spans for name in re.findall(r"[A-Za-z_][\w.]*", span)}
    names = {name for name in names if "_" in name or "." in name} - {"k8s"}
    names |= set(re.findall(r"(?<![\w-])--([a-z][\w.-]*)", text))
    return _wrong_names(path, {name for name in names if not name.endswith((".py", ".md"))})


def test_the_list_is_the_glossarys() -> None:
    assert set(RETIRED) == _glossary_words()


def test_identifiers_and_keys() -> None:
    wrong = []
    for file in SOURCES:
        path = file.relative_to(ROOT).as_posix()
        names = {*_names_of_source(file.read_text(encoding="utf-8")), file.stem}
        wrong += _wrong_names(path, names)
    assert not wrong, "\n".join(["retired words (pipeline/GLOSSARY.md):", *wrong])


def test_flags_columns_and_members() -> None:
    from pipeline.cache.codec.arrow import SHARD_SCHEMA
    from pipeline.cache.codec.spec import CodecSpec
    from pipeline.config.fields import leaves
    from pipeline.sampling.inclusion import InclusionRule
    from stages.cache_teacher import TeacherRun
    from stages.distill import DistillRun
    from stages.eval_student import EvalRun
    from stages.preview import PreviewRun
    from stages.push_student import PushRun
    from stages.rounds import RoundsRun
    from stages.score_student import ScoreRun
    from stages.sweep import SweepRun
    from stages.train_student import StudentRun

    wrong = []
    for model in (
        PreviewRun,
        TeacherRun,
        StudentRun,
        DistillRun,
        EvalRun,
        PushRun,
        SweepRun,
        RoundsRun,
        ScoreRun,
    ):
        for leaf in leaves(model):
            names = {*leaf.dotted.split("."), leaf.flag or leaf.dotted}
            wrong += _wrong_names(f"{model.__name__}.{leaf.dotted}", names)
    wrong += _wrong_names("columns of a shard", set(SHARD_SCHEMA.names))
    codec = CodecSpec(8, InclusionRule((1.0,), (0.25,))).to_json()
    wrong += _wrong_names("members of the codec", set(_keys(codec)))
    for file in sorted((ROOT / "stages/configs").rglob("*.yaml")):
        keys = set(_keys(yaml.safe_load(file.read_text(encoding="utf-8"))))
        wrong += _wrong_names(file.relative_to(ROOT).as_posix(), keys)
    assert not wrong, "\n".join(["retired words (pipeline/GLOSSARY.md):", *sorted(set(wrong))])


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_document(file: Path) -> None:
    path, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
    wrong = [*_wrong_phrases(path, text), *_wrong_code_spans(path, text)]
    assert not wrong, "\n".join(["retired words (pipeline/GLOSSARY.md):", *wrong])


@pytest.mark.parametrize(
    "name",
    ["num_counted", "countedMask", "LAW", "certain_ids", "drawn_E", "gold_logprob", "Thinned",
     "set_aside_rows", "PoisonRow", "unanswered", "LeftOut", "ClaimBoard", "try_claim",
     "breadcrumb", "join_world", "kd_N", "delivery", "student.layers_kept",
     "--student.layers-kept"],
)  # fmt: skip
def test_a_retired_name_is_found(name: str) -> None:
    assert _wrong_names("pipeline/any.py", {name})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pipeline/cache/any.py", "levels_E"), ("pipeline/student/any.py", "cut_model"),
        ("pipeline/student/any.py", "repair_tokens"), ("k8s/any.py", "look"),
    ],
)  # fmt: skip
def test_a_name_is_found_where_its_sense_is_retired(path: str, name: str) -> None:
    assert _wrong_names(path, {name})
    assert not _wrong_names("pipeline/observe/any.py", {name})


@pytest.mark.parametrize(
    "name", ["world_size", "WORLD_SIZE", "golden", "discounted", "account", "lookup", "shortcut",
             "always_kept", "left", "tokens_cut_off", "withdrawn", "kde", "lawful", "thing"],
)  # fmt: skip
def test_an_ordinary_name_passes(name: str) -> None:
    assert not _wrong_names("pipeline/any.py", {name})


@pytest.mark.parametrize(
    "text",
    ["mean over counted tokens", "such rows are set\naside after three tries", "the law of a cache",
     "its certain entries", "drawn entries take", "the gold token", "quantisation levels",
     "thinned without bias", "a poison row", "unanswered rows", "damaged shards are left out",
     "each claims shards", "a breadcrumb", "a student cut to six layers", "repair the student",
     "delivers the finished student", "in a smaller world", "the look job",
     "the `train/kd` column"],
)  # fmt: skip
def test_a_retired_phrase_is_found(text: str) -> None:
    assert _wrong_phrases("README.md", text)


@pytest.mark.parametrize(
    "text",
    ["by the law of large numbers", "a certain value", "it is certain that", "cut off at most 8",
     "files are counted once", "golden samples", "log level", "a thin layer", "drawn at random",
     "left out of the sum", "this claim needs a number", "the real world", "a look at the page",
     "`python -m pipeline.cache repair`", "the stream delivers 19 times the tokens",
     "world size", "random-sampling KD", "a conversation that the template rejects is counted"],
)  # fmt: skip
def test_ordinary_english_passes(text: str) -> None:
    assert not _wrong_phrases("README.md", text)


def test_flags_of_documents_are_names() -> None:
    assert _wrong_code_spans("README.md", "set `--student.layers_kept 10`")
    assert _wrong_code_spans("README.md", "run it with --student.layers_kept 10")
    assert not _wrong_code_spans("README.md", "`make bench-quality ARGS=--tried`")
