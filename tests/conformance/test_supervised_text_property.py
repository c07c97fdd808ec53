"""Random chats: the supervised text is exactly what the rules put together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from tests.conformance.chats import Chat, Turn
from tests.conformance.chats.model import chat
from tests.conformance.expected import NO_SAMPLE, QUARANTINED, expected
from tests.conformance.suite import named
from tests.conformance.templates import MARKS, SPECIAL, TEMPLATES, Template
from tests.conformance.trying import build, supervised
from tests.conformance.vocabularies import KINDS, comparable

EXAMPLES = 200
_LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_ASCII = st.characters(min_codepoint=32, max_codepoint=126)
_SNIPPETS = [
    " ", "  ", "\n", "\n\n", "\t", "<", ">", "</", "<|", "[", "{{", "}}", "'", '"', "\\n", "a",
    "user", "assistant", "ASSISTANT: ", "USER: ", "### Response:\n", "model", "think", "im_end",
    "The answer", "\r\n",
]  # fmt: skip


def _texts(kind: str) -> st.SearchStrategy[str]:
    letters = _ASCII if kind == "wordpiece" else _LETTERS
    snippets = [each for each in _SNIPPETS if kind != "wordpiece" or "\r" not in each]
    pieces = st.lists(st.sampled_from(snippets) | st.text(letters, max_size=6), max_size=6)
    return (st.text(letters, max_size=30) | pieces.map("".join)).filter(
        lambda text: not any(token in text for token in (*SPECIAL, *MARKS))
    )


@st.composite
def _chats(draw: st.DrawFn, kind: str) -> Chat:
    texts = _texts(kind)
    count = draw(st.integers(1, 8))
    if draw(st.integers(0, 5)):
        roles = ["user" if number % 2 == 0 else "assistant" for number in range(count)]
    else:
        roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=count))
    turns = [Turn("system", "S" + draw(texts))] if draw(st.booleans()) else []
    marks: dict[int, dict[str, Any]] = {}
    for role in roles:
        if role == "user":
            turns.append(Turn("user", draw(texts)))
            continue
        weight = draw(st.sampled_from([None, None, 1, 0]))
        if weight is not None:
            marks[len(turns)] = {"weight": weight}
        thinks = not draw(st.integers(0, 7))
        reasoning = draw(texts.filter(lambda text: bool(text.strip()))) if thinks else ""
        turns.append(Turn("assistant", draw(texts), reasoning=reasoning, supervised=weight != 0))
    return chat("random", *turns, marks=marks)


def check(examples: int, *, derandomize: bool) -> None:
    """Try that many random chats; the first that fails, made small, is raised."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=derandomize,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.data(), st.sampled_from(TEMPLATES), st.sampled_from(KINDS))
    def run(data: st.DataObject, template: Template, kind: str) -> None:
        _agree(data.draw(_chats(kind)), template, kind)

    run()


def _agree(random: Chat, template: Template, kind: str) -> None:
    wanted = expected(random, template)
    note(f"{template.name}, {kind}, expected {wanted!r}")
    # Under most templates every thought is lost: few of these say enough.
    assume(wanted != QUARANTINED or not random.turns[-1].reasoning)
    with tempfile.TemporaryDirectory() as folder:
        path = _written([named("plain")[0], random], Path(folder))
        corpus = build(path, template, kind)
    texts = {sample.source_index: supervised(sample, template, kind) for sample in corpus.samples}
    if wanted in (QUARANTINED, NO_SAMPLE):
        assert 1 not in texts
        assert corpus.counts.quarantined == (wanted == QUARANTINED)
    else:
        assert comparable(kind, texts[1]) == comparable(kind, wanted)


def _written(chats: list[Chat], folder: Path) -> Path:
    from tests.conformance.containers import write

    return write([each.row for each in chats], "jsonl", folder)


def test_random_chats() -> None:
    check(EXAMPLES, derandomize=True)
