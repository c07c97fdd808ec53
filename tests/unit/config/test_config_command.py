"""Files below flags, names and values as people type them, and every mistake at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.api.settings import TeacherRun
from pipeline.config import Command, Settings, dump_yaml, fingerprint, option, parse_command
from pipeline.config.command import command_line
from pipeline.config.fields import leaves
from pipeline.errors import ConfigError


class Engine(Settings):
    """A section."""

    name: str = option("small", "which one", flag="engine_name")
    half: bool | None = option(None, "in half precision", flag="bf16")
    strict: bool = option(False, "refuse more")
    kind: Literal["none", "some", "on"] = option("none", "a choice whose names are YAML words")
    rate: float = option(0.5, "a number", gt=0)


class Run(Settings):
    """A run."""

    out_dir: str = option("out", "where it goes")
    seed: int = option(1, "of the draws", ge=0)
    steps: int | None = option(None, "how many", ge=1)
    label: str | None = option(None, "a text or nothing")
    grid: tuple[float, ...] = option((1.0,), "a list of numbers")
    names: tuple[str, ...] = option((), "a list of texts", flag="names_of_parts")
    engine: Engine = Engine()


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a writer of configuration files."""

    def run(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return run


def _parse(*argv: str, model: type[Any] = Run) -> Command[Any]:
    return parse_command(
        model, argv, prog="prog", description="It runs.", switches={"dry_run": "only plan"}
    )


def _mistakes(*argv: str, model: type[Any] = Run) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        _parse(*argv, model=model)
    assert caught.value.exit_code == 2
    assert all(line in str(caught.value) for line in caught.value.mistakes)
    return caught.value.mistakes


def test_defaults_below_files_below_flags(write: Write) -> None:
    one = write("seed: 2\nout_dir: one\nengine:\n  name: first\n  rate: 0.25\n", "one.yaml")
    two = write('{"out_dir": "two", "engine": {"name": "second"}}', "two.json")
    command = _parse("--seed", "3", "--config", one, "--config", two)
    run = command.settings
    assert (run.seed, run.out_dir, run.engine.name) == (3, "two", "second")
    assert run.engine.rate == 0.25  # a later file replaces fields, not sections
    assert run.steps is None
    assert command.given == {"seed", "out_dir", "engine.name", "engine.rate"}
    assert _parse("--config", two, "--config_file", one).settings.out_dir == "one"
    assert _parse("--config", one, "--engine.name", "flag").settings.engine.name == "flag"
    assert _parse("--seed", "4", "--seed", "5").settings.seed == 5
    assert _parse().given == frozenset()


@pytest.mark.parametrize(
    "flag",
    ["--engine.name=x", "--engine_name=x", "--engine-name=x", "--engine.name x", "--engine-name x"],
)
def test_a_field_answers_to_each_of_its_names(flag: str) -> None:
    assert _parse(*flag.split()).settings.engine.name == "x"


@pytest.mark.parametrize("key", ["engine_name", "engine-name", "engine.name", '"engine.name"'])
def test_short_and_dotted_names_in_files(key: str, write: Write) -> None:
    command = _parse("--config", write(f"{key}: x\nengine: {{rate: 2}}\nout-dir: y\n"))
    assert (command.settings.engine.name, command.settings.engine.rate) == ("x", 2.0)
    assert command.settings.out_dir == "y"
    command = _parse("--config", write(f"engine: {{rate: 2}}\n{key}: x\n"))
    assert (command.settings.engine.name, command.settings.engine.rate) == ("x", 2.0)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ("--bf16", True), ("--no-bf16", False), ("--no_bf16", False), ("--bf16=false", False),
        ("--bf16 false", False), ("--bf16 True", True), ("--bf16=1", True), ("--bf16=off", False),
        ("--bf16 yes", True), ("--bf16=none", None), ("--bf16 null", None),
        ("--no-bf16 --seed 3", False),
        ("--bf16 --seed 3", True), ("--engine.half", True), ("--no-engine.half", False),
    ],
)  # fmt: skip
def test_booleans(argv: str, value: bool | None) -> None:
    run = _parse(*argv.split()).settings
    assert run.engine.half is value
    assert run.seed == (3 if "seed" in argv else 1)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--grid", "1,2"], "grid", (1.0, 2.0)), (["--grid", "[1, 2.5]"], "grid", (1.0, 2.5)),
        (["--grid=3"], "grid", (3.0,)), (["--grid", "1e-1,2"], "grid", (0.1, 2.0)),
        (["--grid", "1", "2.5", "--seed", "2"], "grid", (1.0, 2.5)),
        (["--grid", "1,2", "[3, 4]", "-5"], "grid", (1.0, 2.0, 3.0, 4.0, -5.0)),
        (["--names", "a", "[0-9]+"], "names", ("a", "[0-9]+")),
        (["--names", "a,b"], "names", ("a", "b")), (["--names", "[a]"], "names", ("a",)),
        (["--names", "[]"], "names", ()), (["--names", "[0-9]+"], "names", ("[0-9]+",)),
        (["--names", r"layers\.[01],^norm"], "names", (r"layers\.[01]", "^norm")),
        (["--names-of-parts", "*x"], "names", ("*x",)),
        (["--steps", "none"], "steps", None), (["--steps", "7"], "steps", 7),
        (["--label", "none"], "label", None), (["--label", "7"], "label", "7"),
        (["--label", "true"], "label", "true"), (["--label="], "label", ""),
        (["--label", "a: b"], "label", "a: b"), (["--label=--x"], "label", "--x"),
        (["--out_dir", "none"], "out_dir", "none"), (["--out_dir", "1_0"], "out_dir", "1_0"),
        (["--engine.kind", "none"], "engine.kind", "none"),
        (["--engine.kind", "some"], "engine.kind", "some"),
        (["--engine.rate", "1e-3"], "engine.rate", 0.001),
        (["--engine.rate", "2"], "engine.rate", 2.0),
    ],
)  # fmt: skip
def test_values_as_people_type_them(argv: list[str], field: str, value: object) -> None:
    found: Any = _parse(*argv).settings
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_choice_named_like_a_yaml_word() -> None:
    from pipeline.student.settings.student import StudentSettings

    class Student(Settings):
        student: StudentSettings = StudentSettings()

    assert (
        _parse("--student.reconstruct", "none", model=Student).settings.student.reconstruct
        == "none"
    )


def test_switches() -> None:
    assert _parse("--dry-run").switches == {"dry_run"}
    assert _parse("--dry_run", "--seed", "2").switches == {"dry_run"}
    assert _parse().switches == frozenset()


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("teacher.yaml", "; a file of settings is given as --config teacher.yaml"),
        ("runs/Teacher.YML", "; a file of settings is given as --config runs/Teacher.YML"),
        ("-seed", "; did you mean --seed?"),
        ("seed=3", "; did you mean --seed?"),
        ("stray", ""),
        ("--", ""),
    ],
)
def test_a_word_without_dashes_is_told_what_it_may_be(word: str, hint: str) -> None:
    assert _mistakes(word) == (f"{word!r}: expected a flag that starts with --{hint}",)


def test_the_value_after_a_flag_of_one_dash_is_no_mistake_of_its_own() -> None:
    assert len(_mistakes("-seed", "3")) == 1
    assert len(_mistakes("-seed", "--steps", "many")) == 2
    assert len(_mistakes("stray", "3")) == 2


@pytest.mark.parametrize("flag", ["--no-seed", "--no_seed", "--no-out_dir", "--no-engine.rate"])
def test_only_switches_have_a_negation(flag: str) -> None:
    """`--no-seed` would be a seed of 0, and nobody would notice."""
    (mistake,) = _mistakes(flag)
    assert mistake.startswith(f"{flag}: unknown flag")


def test_every_mistake_at_once(write: Write) -> None:
    file = write("enigne: {name: x}\nengine: {nmae: y, rate: -1}\nsteps: many\n")
    missing = _mistakes(
        "--config", file, "--sede", "3", "--seed", "-5", "stray", "--engine.strict", "maybe",
        "--dry_rum", "--label",
    )  # fmt: skip
    text = "\n".join(missing)
    assert "--sede: unknown flag; did you mean --seed?" in missing
    assert "--dry_rum: unknown flag; did you mean --dry_run?" in missing
    assert "--label: expected a value after it" in missing
    assert "'stray': expected a flag that starts with --" in missing
    assert "enigne: unknown field; did you mean engine?" in missing
    assert "engine.nmae: unknown field; did you mean engine.name?" in missing
    assert "engine.rate: found -1, expected greater than 0" in missing
    assert "steps: found 'many', expected integer | none" in missing
    assert "seed: found -5, expected greater than or equal to 0" in missing
    assert "'maybe'" in text
    assert "'3'" not in text  # the value of an unknown flag is not reported as well
    assert len(missing) == 10


def test_broken_files_and_other_mistakes_come_together(write: Write) -> None:
    broken = write("a: [1\n", "broken.yaml")
    found = _mistakes("--config", "gone.yaml", "--config", broken, "--sede", "1")
    assert len(found) == 3
    assert any("gone.yaml: cannot be read (No such file or directory)" in line for line in found)
    assert any("broken.yaml, line 2" in line for line in found)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("seed: 1\nout_dir: a\nseed: 2\n", "a.yaml", "line 3: the key 'seed' is given twice"),
        ("engine:\n  rate: 1\n  rate: 1\n", "a.yaml", "line 3: the key 'rate' is given twice"),
        ("seed: 1\n  bad: [\n", "a.yaml", "line 2"),
        ("seed: \x01\n", "a.yaml", "expected YAML"),
        ('{"seed": 1,\n "out_dir" 3}', "a.json", "line 2: Expecting ':' delimiter; expected JSON"),
        ("- 1\n", "a.yaml", "holds list; expected a mapping"),
        ("[1]", "a.json", "holds list"),
        ("seed: 1", "a.toml", "the ending .toml; expected .yaml, .yml or .json"),
        ("engine: 3\n", "a.yaml", "engine: found 3, expected a mapping"),
        ("engine: null\nengine_name: x\n", "a.yaml", "engine: expected a mapping, found None"),
        ("1: x\n", "a.yaml", "1: found the key 1, expected a text"),
        ("config_file: b.yaml\n", "a.yaml", "cannot name another file"),
        ("seed: .nan\n", "a.yaml", "seed: found nan"),
        ("engine: {rate: .inf}\n", "a.yaml", "engine.rate: found inf"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_words(
    text: str, name: str, says: str, write: Write
) -> None:
    found = "\n".join(_mistakes("--config", write(text, name)))
    assert says in found
    assert "pydantic" not in found


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in _mistakes("--config", str(tmp_path / "a.yaml"))[0]
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in _mistakes("--config", str(tmp_path / "folder.yaml"))[0]
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert _parse("--config", str(tmp_path / "empty.yaml")).settings == Run()


def test_the_same_key_twice_in_json_is_refused(write: Write) -> None:
    (found,) = _mistakes("--config", write('{"seed": 1,\n"seed": 2}', "a.json"))
    assert "'seed' is given twice" in found


def test_sections_own_checks_name_the_field_once() -> None:
    (found,) = _mistakes("--capture.temperatures", "[2]", model=TeacherRun)
    assert found == "capture.temperatures: 1.0 is missing, expected it in the list"
    (found,) = _mistakes("--bf16", "--fp16", model=TeacherRun)
    assert found == "teacher: bf16 and fp16 are both on, expected at most one"


def test_settings_are_frozen() -> None:
    run = Run()
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


_texts = st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
) | st.sampled_from(
    ["none", "null", "true", "yes", "1", "1e3", "0x1F", "", " ", "~", "a: b", "# c", "- x", "{}",
     "2020-01-01", "1:30", "\x85", "\ufeff", "\r\n", "\t", "=", "<<", "!x", "&a", "*a", "|", ">"]
)  # fmt: skip
_runs = st.builds(
    Run,
    out_dir=_texts,
    seed=st.integers(0, 2**70),
    steps=st.none() | st.integers(1, 9),
    label=st.none() | _texts,
    grid=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4).map(tuple),
    names=st.lists(_texts, max_size=3).map(tuple),
    engine=st.builds(
        Engine,
        name=_texts,
        half=st.none() | st.booleans(),
        strict=st.booleans(),
        kind=st.sampled_from(["none", "some", "on"]),
        rate=st.floats(1e-300, 1e300),
    ),
)


@given(run=_runs)
@settings(max_examples=300, deadline=None)
def test_dumped_yaml_is_accepted_back_unchanged(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_yaml(run), encoding="utf-8")
    again = _parse("--config", str(file))
    assert again.settings == run
    assert again.given == {leaf.dotted for leaf in leaves(Run)}
    assert dump_yaml(again.settings) == dump_yaml(run)
    as_json = file.with_suffix(".json")
    as_json.write_text(json.dumps(run.model_dump(mode="json")), encoding="utf-8")
    assert _parse("--config", str(as_json)).settings == run


def test_the_stages_own_file_is_accepted_and_dumps_back(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    run = _parse("--config", str(root / "stages/configs/teacher.yaml"), model=TeacherRun).settings
    file = tmp_path / "again.yaml"
    file.write_text(dump_yaml(run))
    assert _parse("--config", str(file), model=TeacherRun).settings == run


class _NoEnvironment(dict[str, str]):
    """A stand-in for os.environ that fails when read."""

    def _seen(self, *_args: object) -> NoReturn:
        raise AssertionError("the configuration looked at the environment")

    __getitem__ = get = __contains__ = __iter__ = items = keys = _seen  # type: ignore[assignment]


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the environment by one that must not be read."""
    with monkeypatch.context() as patch:
        for name in ("SEED", "OUT_DIR", "ENGINE_NAME", "BF16", "DISTILL_SEED", "CONFIG"):
            patch.setenv(name, "7")
        patch.setattr(os, "environ", _NoEnvironment())
        yield


@pytest.mark.usefixtures("no_environment")
def test_environment_is_never_read(write: Write) -> None:
    file = write("out_dir: $HOME\nlabel: ${SEED}\n")
    run = _parse("--config", file, "--engine_name", "$SEED").settings
    assert (run.seed, run.out_dir, run.label, run.engine.name) == (1, "$HOME", "${SEED}", "$SEED")
    assert run.engine.half is None


def test_fingerprint_is_of_content() -> None:
    assert fingerprint({"b": [1.0, None], "a": "ä"}) == fingerprint({"a": "ä", "b": [1.0, None]})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    import hashlib

    assert fingerprint({"b": 1, "a": "ä"}) == hashlib.sha256('{"a":"ä","b":1}'.encode()).hexdigest()


def test_command_line_can_be_typed_again() -> None:
    assert command_line("python -m x", ["--a", "b c"]) == "python -m x --a 'b c'"


def test_a_question_is_not_followed_by_a_full_stop() -> None:
    with pytest.raises(ConfigError) as caught:
        _parse("--sed", "3")
    assert str(caught.value).endswith("did you mean --seed?")
