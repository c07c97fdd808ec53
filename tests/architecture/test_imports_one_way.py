"""Data flows one way, and each outside world is known to one file."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.stage_runner import ROOT

SOURCES = sorted(
    file for part in ("pipeline", "stages", "k8s") for file in ROOT.glob(f"{part}/**/*.py")
)
ADAPTERS = {
    "vllm": {
        "pipeline/teacher/engines/vllm.py",
        "pipeline/teacher/generation/vllm.py",
        "pipeline/teacher/engines/vllm_pooler.py",
        "pipeline/teacher/engines/vllm_rotary.py",
    },
    "deepspeed": {
        "pipeline/student/training/deepspeed_engine.py",
        "pipeline/student/engine/deepspeed_parts.py",
        "pipeline/student/sequence/attention.py",
    },
    "peft": {"pipeline/student/build/lora.py"},
    "datasets": {"pipeline/corpus/sources/hub.py"},
    "wandb": {"pipeline/observe/trackers.py"},
    "trackio": {"pipeline/observe/trackers.py"},
    "mlflow": {"pipeline/observe/trackers.py"},
    "tensorboard": {"pipeline/observe/trackers.py"},
    "prometheus_client": {"pipeline/observe/prometheus.py"},
    # The corpus may lie where the cache does; it reads whole files of others, the store writes.
    "fsspec": {"pipeline/storage/store.py", "pipeline/corpus/sources/files.py"},
    # Where Triton is, there is a GPU; `chunk_gradient` asks before it imports this.
    "triton": {
        "pipeline/loss/chunk_gradient_triton.py",
        "pipeline/teacher/sparsify/gpu/kernels.py",
    },
    "optuna": {"pipeline/sweeps/search.py"},
    "lm_eval": {"pipeline/evaluate/harness.py"},
    "urllib3": {"pipeline/teacher/engines/endpoint/client.py"},
    "s3fs": set(),
    "accelerate": {"pipeline/observe/accelerate_trackers.py"},
    "trl": set(),
}
HEAVY = {*ADAPTERS, "torch", "transformers", "huggingface_hub", "matplotlib", "pandas"}
# Files that are all about torch: imported by those that are about to use it.
AT_THE_TOP = re.compile(
    r"pipeline/(api/(dataset|sparse_kl)|loss/(?!settings|__init__)|data/(collate|temperature|heldout|transfer|stream/train_stream)"
    r"|evaluate/heldout|student/training/(module|loop|token_weights|logged/)"
    r"|student/forward/(trial|varlen|ways|router)|student/sequence/(slices|join|trial)"
    r"|teacher/(engines/vllm_(pooler|rotary)|sparsify/gpu/(chains|choice|kernels|launch)))"
)


def _imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                yield str(argument.value).split(".")[0], node


@functools.cache
def _imported_by(file: Path) -> frozenset[str]:
    return frozenset(name for name, _ in _imports(ast.parse(file.read_text(encoding="utf-8"))))


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_import_linter_is_content() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("package", ADAPTERS)
def test_one_adapter_knows_it(package: str) -> None:
    found = {_name(file) for file in SOURCES if package in _imported_by(file)}
    assert found <= ADAPTERS[package], f"{package} is imported by {sorted(found)}"


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """Inside the function that needs them, so that `--help` and the checks stay instant."""
    early = []
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in top for name, _ in _imports(node)}
        if names & HEAVY and not AT_THE_TOP.match(_name(file)):
            early.append(f"{_name(file)}: {', '.join(sorted(names & HEAVY))}")
    assert not early


def test_the_stages_know_nothing_of_each_other() -> None:
    """What crosses is the cache; but for `distill`, which starts both as processes."""
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        imported = {
            node.module or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom)
        }
        if _name(file).startswith("pipeline/teacher"):
            assert not any(name.startswith("pipeline.student") for name in imported), _name(file)
        if _name(file).startswith(("pipeline/student", "pipeline/data", "pipeline/evaluate")):
            assert not any(name.startswith("pipeline.teacher") for name in imported), _name(file)
            assert not any(name.startswith("pipeline.corpus") for name in imported), _name(file)


def test_every_configuration_in_the_house_is_accepted() -> None:
    from pipeline.api.settings import StudentRun, TeacherRun
    from pipeline.config import parse_command
    from pipeline.sweeps.file import read_sweep_file
    from stages.rounds import RoundsRun
    from stages.sweep import read_space

    files = sorted((ROOT / "stages/configs").rglob("*.yaml"))
    assert files
    for file in files:
        keys = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        # tests/unit/sweeps/test_sweep_file.py reads those of sweeps, with their spaces.
        if "unfrozen_parameters" in keys or file.parent.name == "sweeps":
            continue
        if file.parent.name == "sweeps":
            space = read_space(read_sweep_file(str(file)))
            assert not space.mistakes, file
            assert "search" in keys or len(space.points()) >= 4, file
            continue
        model = TeacherRun if {"teacher", "corpus", "capture"} & set(keys) else StudentRun
        model = RoundsRun if "rounds" in keys else model
        parse_command(model, ["--config", str(file)], prog="p", description="")
