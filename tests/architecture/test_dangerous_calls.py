"""No line of the code does what SECURITY.md rules out: pickles, unsafe YAML, templates, shells."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file for room in ("pipeline", "stages", "k8s") for file in (ROOT / room).rglob("*.py")
)
OWN_PICKLES = {
    "pipeline/corpus/sources/hub.py": "a table that the same function pickled",
    "pipeline/teacher/preparation/processes.py": "what the parent process hands over",
}
OWN_TEMPLATES = {
    "pipeline/printable.py": "pages that belong to this project, with autoescape",
    "pipeline/corpus/chat/rendering/template.py": "a template is parsed, never rendered",
}
_FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load", "marshal.loads", "shelve.open", "joblib.load", "dill.loads", "pd.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call with the dotted name that it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def argument(node: ast.Call, name: str) -> str | None:
    """Return the text of a keyword argument."""
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)


def mistakes(name: str, source: str) -> list[str]:
    """Return what of a file is not as SECURITY.md says."""
    tree = ast.parse(source)
    found = []
    safe = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    }
    for called, node in calls(tree):
        where = f"{name}:{node.lineno}: {called}"
        if called in _FORBIDDEN or argument(node, "shell") not in (None, "False"):
            found.append(where)
        if called.endswith("torch.load") and argument(node, "weights_only") != "True":
            found.append(f"{where} without weights_only=True")
        if called.endswith(("np.load", "numpy.load")) and argument(node, "allow_pickle"):
            found.append(f"{where} with allow_pickle")
        if called == "yaml.load" and ast.unparse(node.args[1]) not in safe:
            found.append(f"{where} with another loader than yaml.SafeLoader")
        if called == "pickle.loads" and name not in OWN_PICKLES:
            found.append(where)
        if called.split(".")[-1] in ("Environment", "Template") and name not in OWN_TEMPLATES:
            found.append(f"{where}: Jinja without a sandbox")
        trusted = argument(node, "trust_remote_code")
        if trusted == "True":
            found.append(f"{where} with trust_remote_code")
        if called == "AutoTokenizer.from_pretrained" and trusted is None:
            found += [] if argument(node, "gguf_file") else [f"{where} may ask to run code"]
    return found


def test_no_file_does_what_security_md_rules_out() -> None:
    found = [
        line
        for file in FILES
        for line in mistakes(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
        "yaml.load(t, yaml.Loader)", "pickle.loads(b)", "pickle.load(f)", "eval(x)", "exec(x)",
        "subprocess.run(c, shell=True)", "jinja2.Environment().from_string(t)", "os.system(c)",
        "AutoTokenizer.from_pretrained(f)", "load(f, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_each_of_them_is_found(line: str) -> None:
    assert mistakes("pipeline/x.py", line)


def test_trust_remote_code_is_off_unless_it_is_asked_for() -> None:
    from pipeline.student.settings.student import StudentSettings
    from pipeline.teacher.settings import TeacherSettings

    assert TeacherSettings.model_fields["trust_remote_code"].default is False
    assert StudentSettings.model_fields["trust_remote_code"].default is False


def test_chat_templates_run_in_a_sandbox() -> None:
    from jinja2.exceptions import SecurityError
    from transformers.utils.chat_template_utils import render_jinja_template

    escape = "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}"
    with pytest.raises(SecurityError):
        render_jinja_template(conversations=[[{"role": "user", "content": "a"}]],
                              chat_template=escape)  # fmt: skip
