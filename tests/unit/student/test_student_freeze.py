"""Which parameters learn, and patterns that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pipeline.errors import ConfigError
from pipeline.student.build.freeze import apply_freezing, read_unfrozen_parameters
from pipeline.student.settings.student import StudentSettings
from tests.unit.student.tiny_models import tiny_model


class _Deep(nn.Module):
    """Twelve layers, so that 1 is a beginning of 10 and 11."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(12))
        self.config = SimpleNamespace(num_hidden_layers=12)

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None


def _learning(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _freeze(model: Any, *patterns: str) -> set[str]:
    share = apply_freezing(model, StudentSettings(freeze=patterns))
    learning = _learning(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert share == pytest.approx(sum(sizes[n] for n in learning) / sum(sizes.values()))
    return learning


@pytest.fixture
def spectrum(tmp_path: Path) -> Any:
    """Return a writer of Spectrum files."""

    def write(patterns: Sequence[str]) -> StudentSettings:
        file = tmp_path / "unfrozen.yaml"
        lines = "".join(f"- {pattern}\n" for pattern in patterns)
        file.write_text(f"unfrozen_parameters:\n{lines}")
        return StudentSettings(layers_to_unfreeze=str(file))

    return write


def test_nothing_is_frozen_by_default() -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert apply_freezing(model, StudentSettings()) == 1.0
    assert _learning(model) == {name for name, _ in model.named_parameters()}


def test_frozen_patterns() -> None:
    every = {name for name, _ in tiny_model().named_parameters()}
    assert _freeze(tiny_model(), "embed_tokens", "norm") == {
        name for name in every if "embed_tokens" not in name and "norm" not in name
    }
    found = _freeze(tiny_model(), r"layers\.[0-4]\.", "^lm_head")
    ends = {"model.norm.weight", "model.embed_tokens.weight"}
    assert found == {name for name in every if ".layers.5." in name} | ends


def test_a_plain_text_is_not_read_as_an_expression() -> None:
    # As an expression, "layers.1." would match "layers.10." and "layers.11." as well.
    found = _freeze(_Deep(), "layers.1.")
    assert found == {f"layers.{i}.weight" for i in range(12) if i != 1}
    found = _freeze(_Deep(), r"^layers.1\d")
    assert found == {f"layers.{i}.weight" for i in range(10)}


def test_spectrum_file(spectrum: Any) -> None:
    model = tiny_model()
    settings = spectrum(["^lm_head.weight$", "model.layers.3.mlp.down_proj", "layers.5.self_attn"])
    apply_freezing(model, settings)
    every = {name for name, _ in model.named_parameters()}
    assert _learning(model) == {"lm_head.weight", "model.layers.3.mlp.down_proj.weight"} | {
        name for name in every if "layers.5.self_attn" in name
    }


def test_tied_weights_answer_to_both_names(spectrum: Any) -> None:
    model = tiny_model(tied=True)
    apply_freezing(model, spectrum(["^lm_head.weight$", "^model.layers.0.mlp.up_proj"]))
    assert _learning(model) == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    assert model.lm_head.weight.requires_grad
    model = tiny_model(tied=True)
    assert "model.embed_tokens.weight" not in _freeze(model, "lm_head")
    assert not model.lm_head.weight.requires_grad


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(ConfigError, match=r"student.freeze: 'layer.7', 'embd' match no parameter"):
        _freeze(tiny_model(), "mlp", "layer.7", "embd")
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        _freeze(tiny_model(), "(")


def test_a_refusal_changes_nothing() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="every parameter of the student is frozen"):
        _freeze(model, ".")
    assert _learning(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "text",
    ["other: [a]\n", "unfrozen_parameters: []\n", "unfrozen_parameters: a\n",
     "unfrozen_parameters: [1]\n", "{}\n"],
)  # fmt: skip
def test_files_that_are_no_spectrum(text: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong.yaml holds .*`unfrozen_parameters`"):
        read_unfrozen_parameters(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_unfrozen_parameters(str(tmp_path / "gone.yaml"))
