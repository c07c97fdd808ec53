"""The wheel: one package at the top, and both stages in a folder that is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import Tiny, digests
from tests.stage_runner import ENVIRONMENT, ROOT, Result

BUILD = """
import sys
sys.path.insert(0, "stages")
import build_backend
print(build_backend.build_wheel(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install it into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Return a folder whose own modules have the names of ours."""
    for name in ("pipeline", "stages"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the user\\'s own module')\n")
    return tmp_path


def _distil(site: Path, folder: Path, *arguments: object) -> Result:
    done = subprocess.run(
        [sys.executable, site / "bin/distil", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{folder}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_one_package_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"offline_distill"}
    assert "offline_distill/stages/configs/teacher.yaml" in names
    assert "offline_distill/pipeline/report/html/page.html.jinja" in names
    assert "offline_distill/py.typed" in names
    assert not [name for name in names if "setup_env" in name or "locks/" in name]


def test_nothing_in_it_imports_the_checkouts_names(wheel: Path) -> None:
    import ast

    with zipfile.ZipFile(wheel) as files:
        sources = {name: files.read(name) for name in files.namelist() if name.endswith(".py")}
    assert len(sources) > 300
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found = [ast.unparse(node.args[0]).strip("'\"f")]
            roots = {module.split(".")[0] for module in found}
            assert not roots & {"pipeline", "stages", "tests", "k8s"}, name


def test_commands_where_others_have_our_names(site: Path, elsewhere: Path) -> None:
    overview = _distil(site, elsewhere).ok().out
    assert "train-student" in overview
    told = _distil(site, elsewhere, "train-student", "--help").ok().out
    assert "distil train-student" in told
    assert "-m stages" not in told
    golden = ROOT / "tests/golden/cache-v1-top-k"
    assert "supervised" in _distil(site, elsewhere, "cache", "inspect", golden).ok().out
    message = _distil(site, elsewhere, "train-student", "--cache_dir", "none").refused(3)
    assert "none" in message


def test_the_python_interface(site: Path, elsewhere: Path) -> None:
    code = (
        "import offline_distill, sys; from offline_distill import open_cache;"
        f"print(open_cache({str(ROOT / 'tests/golden/cache-v1-top-k')!r}).manifest.total().rows);"
        "print(offline_distill.__version__, 'pipeline' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "0.1.0 False"


@pytest.mark.slow
def test_both_stages(
    site: Path, elsewhere: Path, tiny: Tiny, tiny_cache: Path, tiny_run: Path
) -> None:
    """The wheel's stages leave the bytes of the checkout's."""
    cache, student = elsewhere / "cache", elsewhere / "student"
    _distil(site, elsewhere, "cache-teacher", *tiny.stage_one, "--cache_dir", cache).ok()
    flags = [*tiny.stage_two, "--cache_dir", cache, "--output_dir", student]
    _distil(site, elsewhere, "train-student", *flags).ok()
    name = "data/train/00000.parquet"
    assert digests(cache)[name] == digests(tiny_cache)[name]
    name = "model/model.safetensors"
    assert digests(student)[name] == digests(tiny_run)[name]
