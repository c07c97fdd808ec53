"""Each recipe is held to the published configurations of its models and to its devices' memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.api.settings import StudentRun, TeacherRun
from pipeline.config.files import read_config_file
from pipeline.models.resolve import most_positions, text_config
from pipeline.models.shape import model_shape
from pipeline.observe.devices import FULL_SHARE
from pipeline.student.build.check import check_student
from pipeline.student.build.skeleton import build_skeleton
from pipeline.student.compatibility import check_compatibility
from pipeline.teacher.prepare import check_fits
from pipeline.teacher.sparsify.scheme import capture_scheme
from tests.recipes.__main__ import PAGE, page
from tests.recipes.costs import (
    GIB,
    model_config,
    read_recipe,
    shape_of,
    student_cost,
    student_shape,
    teacher_cost,
)
from tests.recipes.plan import MODELS, RECIPES, STUDENTS, TEACHERS, TOKENIZERS, Student, Teacher
from tests.stage_runner import ROOT

NAMES = sorted(path.stem for path in MODELS.glob("*.json"))
teachers = pytest.mark.parametrize("recipe", TEACHERS, ids=lambda recipe: recipe.file)
students = pytest.mark.parametrize("recipe", STUDENTS, ids=lambda recipe: recipe.file)


def _tokenizer(model: str) -> tuple[str, int]:
    name = model.split("/")[1]
    return next(found for start, found in TOKENIZERS.items() if name.startswith(start))


def test_every_file_is_in_the_plan() -> None:
    files = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")}
    assert files == {recipe.file for recipe in (*TEACHERS, *STUDENTS)}


def test_every_model_is_used() -> None:
    used = {read_recipe(recipe.file, TeacherRun).teacher.model for recipe in TEACHERS}
    used |= {read_recipe(recipe.file, StudentRun).student.model for recipe in STUDENTS}
    assert {name.split("/")[1] for name in used} == set(NAMES)


def test_the_page_is_up_to_date() -> None:
    """`make recipes` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("recipe", [*TEACHERS, *STUDENTS], ids=lambda recipe: recipe.file)
def test_a_file_says_why(recipe: Teacher | Student) -> None:
    lines = (RECIPES / recipe.file).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert yaml.safe_load("\n".join(lines)), "not empty"
    assert all(len(line) <= 110 for line in lines)


@teachers
def test_a_teacher_serves_what_is_asked(recipe: Teacher, tmp_path: Path) -> None:
    run = read_recipe(recipe.file, TeacherRun)
    config = model_config(run.teacher.model, tmp_path)
    check_fits(dict(text_config(config)), run.corpus, run.generate, run.capture)
    shape, parallel = model_shape(config), run.teacher.tensor_parallel_size
    assert shape.heads % parallel == 0
    assert shape.kv_heads % parallel == 0 or parallel % shape.kv_heads == 0
    # vLLM rejects a part of a layer that holds no whole blocks of FP8 weights.
    assert shape.inner % (parallel * shape.block) == 0
    assert run.teacher.engine == "vllm"
    assert run.teacher.dtype(on_gpu=True) == "bfloat16"
    assert run.teacher.for_device(on_gpu=True).step_tokens <= 16384
    assert 1.0 in run.capture.temperatures


@teachers
def test_a_teacher_fits_its_gpus(recipe: Teacher, tmp_path: Path) -> None:
    run, cost = read_recipe(recipe.file, TeacherRun), teacher_cost(recipe, tmp_path)
    assert cost.memory <= cost.limit, f"{cost.memory / GIB:.1f} of {cost.limit / GIB:.1f} GiB"
    assert run.teacher.gpu_memory_utilization <= 0.95
    if run.generate.enabled:
        assert cost.sequences >= 32, "writing few at a time reads the weights for little"


@teachers
def test_a_template_thinks_where_it_is_meant_to(recipe: Teacher) -> None:
    run = read_recipe(recipe.file, TeacherRun)
    options = run.corpus.template_options
    if "Qwen3" in run.teacher.model:
        thinks = options["enable_thinking"]
        assert thinks == run.generate.enabled == ("reasoning" in recipe.file)
        assert run.corpus.reasoning == ("template" if thinks else "drop")
    else:
        assert "enable_thinking" not in options
    if "Llama-3" in run.teacher.model:
        assert options["date_string"], "without it the cache would be another one each day"


@students
def test_a_student_goes_with_its_teacher(recipe: Student, tmp_path: Path) -> None:
    run, taught = read_recipe(recipe.file, StudentRun), read_recipe(recipe.teacher, TeacherRun)
    assert run.cache_dir == taught.cache_dir
    assert Path(run.output.output_dir).parent == Path(run.cache_dir).parent
    rule = capture_scheme(taught.capture).rule
    check_compatibility(run.loss, run.data, grid=taught.capture.temperatures, rule=rule)
    (family, _), (same, pieces) = _tokenizer(taught.teacher.model), _tokenizer(run.student.model)
    if family == same:
        assert run.loss.cross_tokenizer == "reject"
    else:
        assert run.loss.cross_tokenizer == "uld"
    config = model_config(run.student.model, tmp_path)
    # Gemma 3 1B has no row for the one piece that stands for an image.
    assert model_shape(config).vocab_size >= pieces - (family == "gemma-3")
    positions = most_positions(config)
    assert positions is not None
    assert taught.corpus.max_length <= positions
    assert run.data.lanes >= recipe.gpus


@students
def test_a_student_fits_its_gpus(recipe: Student, tmp_path: Path) -> None:
    run, cost = read_recipe(recipe.file, StudentRun), student_cost(recipe, tmp_path)
    assert cost.memory.device <= FULL_SHARE * recipe.device.memory_gib * GIB
    assert cost.memory.offloaded <= 64 * GIB, "an ordinary machine with one card"
    assert run.train.dtype(on_gpu=True) == "bfloat16"
    assert 2**17 <= cost.step_tokens <= 2**18
    assert recipe.gpus > 1 or run.train.zero_stage == 0 or run.train.offload_optimizer


@students
def test_a_student_can_be_built(recipe: Student, tmp_path: Path) -> None:
    """By transformers, without weights: names of frozen parts, adapters and the head fit."""
    run = read_recipe(recipe.file, StudentRun)
    model_config(run.student.model, tmp_path)
    folder = tmp_path / run.student.model.replace("/", "--")
    (folder / "pytorch_model.bin").touch()  # weights whose shapes are not looked at
    if run.student.keep_layers is None:
        check_student(folder, run.student, run.train, run.loss, vocabulary_size=None, on_gpu=True)
        return
    model = build_skeleton(folder, run.student, dtype="bfloat16")
    assert model is not None
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert student_shape(run, tmp_path).parameters == pytest.approx(counted, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_sizes_of_a_model_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config(f"x/{name}", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / f"x--{name}")
    # How weights are stored does not change how many there are.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shape = shape_of(f"x/{name}", tmp_path)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == pytest.approx(counted, rel=2e-3)
    head = model.get_output_embeddings().weight
    assert (shape.vocab_size, shape.hidden) == tuple(head.shape)


def test_the_samples_flags() -> None:
    run = read_recipe("arcee-spark/student.yaml", StudentRun)
    assert (run.loss.temperature, run.loss.alpha, run.seed) == (2.0, 0.5, 42)
    train = run.train
    assert (train.num_train_epochs, train.learning_rate, train.weight_decay) == (3, 2e-5, 0.05)
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (1, 8)
    assert (train.warmup_ratio, train.lr_scheduler_type, train.bf16) == (0.1, "cosine", True)
    taught = read_recipe("arcee-spark/teacher.yaml", TeacherRun)
    assert taught.corpus.dataset_name == "mlabonne/FineTome-100k"
    assert taught.corpus.max_length == 4096


def test_the_published_pages_name_every_folder() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for folder in RECIPES.iterdir():
        if folder.is_dir():
            assert f"{folder.name}/" in text
            assert len(list(folder.iterdir())) <= 14
    assert read_config_file(str(RECIPES / TEACHERS[0].file))
    assert ROOT in PAGE.parents
