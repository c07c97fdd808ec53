"""The finished student is an ordinary model folder: any tool loads it without anything of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cache.io.reader import open_cache
from pipeline.evaluate.measures import HeldoutScores
from tests.conftest import Stage, Tiny
from tests.serving import assert_vllm_agrees
from tests.stage_runner import ROOT, extract_weights, run_apart, run_python

ELSEWHERE = r"""
import json, runpy, sys

hide = runpy.run_path(sys.argv[3])["hide"]
hide("pipeline", "stages", "tests", "deepspeed", "vllm")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "read the file"}], add_generation_prompt=True,
    return_tensors="pt", return_dict=True,
)
new = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1]:]
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0]
print(json.dumps({
    "class": type(model).__name__,
    "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    "use_cache": model.config.use_cache,
    "layers": model.config.num_hidden_layers,
    "new": new.tolist(),
    "text": tokenizer.decode(new),
    "rows": model.get_output_embeddings().weight.shape[0],
    "vocabulary": len(tokenizer),
    "logits": logits[-1].tolist(),
}))
"""


@pytest.mark.slow
def test_it_loads_where_this_project_is_not_installed(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path, tmp_path: Path
) -> None:
    source = open_cache(str(tiny_cache)).source("heldout")
    ids = source.read_rows(0, [0])[0].input_ids_L.tolist()
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    result = run_python(
        ["-I", script, tiny_run / "model", json.dumps(ids), ROOT / "tests/absent.py"], cwd=tmp_path
    ).ok()
    found = json.loads(result.out.splitlines()[-1])
    assert found["class"] == "LlamaForCausalLM"
    assert found["tied"]
    assert found["use_cache"], "training switches it off; whoever generates wants it"
    assert found["layers"] == 2
    assert 1 <= len(found["new"]) <= 8
    # The tiny teacher's padding rows are as random as its others, and students learn them, too.
    assert max(found["new"]) < found["rows"]
    assert "Traceback" not in result.err
    # The same numbers as the weights in the last checkpoint, which the export came from.
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run_apart(extract_weights, tiny_run / "checkpoints/step-00000012", tmp_path / "trained")
    state = load_file(tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tiny_run / "init", dtype=torch.float32).eval()
    before = [value.clone() for value in trained.state_dict().values()]
    trained.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trained.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        logits = trained(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(torch.tensor(found["logits"]), logits, atol=1e-5)


def test_the_weights_are_stored_once_and_nothing_else_is_there(tiny_run: Path) -> None:
    from safetensors import safe_open

    folder = tiny_run / "model"
    names = sorted(file.name for file in folder.iterdir())
    assert names == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as weights:
        keys = set(weights.keys())
        assert "lm_head.weight" not in keys, "tied weights are stored once"
        assert weights.metadata() == {"format": "pt"}
        assert len([key for key in keys if ".layers.1." in key]) == 9
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert str(config.get("dtype")) == "float32"
    assert not list(tiny_run.glob("*.partial"))


def test_the_tokenizer_is_the_caches(tiny_cache: Path, tiny_run: Path) -> None:
    files = open_cache(str(tiny_cache)).tokenizer_files()
    assert "tokenizer.json" in files
    for name, data in files.items():
        assert (tiny_run / "model" / name).read_bytes() == data, name


def test_the_card_says_what_it_is_and_how_good(
    tiny: Tiny, tiny_cache: Path, tiny_run: Path
) -> None:
    card = (tiny_run / "model/README.md").read_text()
    manifest = open_cache(str(tiny_cache)).manifest
    assert f"A student of `{tiny.teacher}`" in card
    assert "pruned to its layers [0, 3]" in card
    assert f"identity `{manifest.identity_digest}`" in card
    assert manifest.identity["teacher"]["revision"] in card
    assert "python -m stages.train_student" in card
    for when, name in (("before", "before training"), ("after", "after training")):
        scores = HeldoutScores.read(str(tiny_run / f"heldout-{when}.json"))
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        kl, agreement = scores.mean("kl"), scores.mean("top1_agreement")
        assert f"{kl.value:.3f} ± {kl.standard_error:.3f}" in line
        assert f"{100 * agreement.value:.1f} %" in line
    assert (
        f"On {len(scores.loss_tokens)} sequences ({sum(scores.loss_tokens)} supervised tokens)"
        in card
    )


def test_frozen_parameters_do_not_move(
    tiny: Tiny, tiny_cache: Path, stage: Stage, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    spectrum = tmp_path / "spectrum.yaml"
    spectrum.write_text("unfrozen_parameters:\n- layers.1.mlp\n- ^model.norm.weight$\n")
    flags = [
        *tiny.stage_two, "--cache_dir", tiny_cache, "--output_dir", tmp_path / "student",
        "--max_steps", "3", "--layers_to_unfreeze", spectrum,
    ]  # fmt: skip
    result = stage("train_student", flags).ok()
    assert "parameters learn" in result.err
    before = load_file(tmp_path / "student/init/model.safetensors")
    after = load_file(tmp_path / "student/model/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {
        "model.norm.weight", "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip


@pytest.mark.slow
def test_vllm_writes_the_same_tokens(tiny_run: Path, tmp_path: Path) -> None:
    assert_vllm_agrees(tiny_run / "model", tmp_path)
