"""The list of `make test-mutations` fits the sources; that tests see it, the run says."""

from __future__ import annotations

import pytest

from tests.mutations.__main__ import verdict_of
from tests.mutations.entries import AREAS, ROOT, Mutation, counts, read
from tests.mutations.trees import Outcome

MUTATIONS = read()


def test_every_area_has_its_part() -> None:
    found = counts(MUTATIONS)
    assert found.total() >= 150
    assert set(found) == set(AREAS)
    assert min(found.values()) >= 3


def test_every_entry_changes_one_line_that_is_there_once() -> None:
    wrong = []
    for mutation in MUTATIONS:
        try:
            changed = mutation.changed(ROOT)
        except (LookupError, FileNotFoundError) as error:
            wrong.append(str(error))
            continue
        if mutation.lines_changed() > 1:
            wrong.append(f"more than one line: {mutation.name}")
        if mutation.old == mutation.new:
            wrong.append(f"nothing changes: {mutation.name}")
        try:
            compile(changed, mutation.file, "exec")
        except SyntaxError as error:
            wrong.append(f"no Python ({error}): {mutation.name}")
    assert not wrong, "\n".join(wrong)


def test_every_entry_names_tests_that_are_there() -> None:
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.name
        for test in mutation.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}" in text, test


def test_no_entry_is_there_twice() -> None:
    keys = [(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS]
    assert sorted(keys) == sorted(set(keys))
    names = [mutation.name for mutation in MUTATIONS]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (0, "survived"),
        (1, "killed"),
        (2, "killed"),
        (-9, "killed"),
        (None, "killed"),
        (5, "broken"),
    ],
)
def test_verdicts(code: int | None, verdict: str) -> None:
    """None: it did not end; a collection that fails (2) is a failing import; 5: no test ran."""
    assert verdict_of(Outcome(code, 1.0, "")) == verdict


def test_a_line_that_is_gone_or_there_twice_is_an_error() -> None:
    one = MUTATIONS[0]
    for old in ("no line of any source", "\n"):
        with pytest.raises(LookupError, match="not once"):
            Mutation(one.area, one.file, old, "", "", one.tests).changed(ROOT)
