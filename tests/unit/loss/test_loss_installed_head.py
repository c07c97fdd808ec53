"""A model's own head with the loss inside: transforms, settings, measuring, refusals."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.loss import reference
from pipeline.loss.head import (
    DistillHead,
    LogitTransform,
    check_distill_head,
    install_distill_head,
    logit_transform,
)
from pipeline.loss.settings import LossSettings
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets, LossTerms
from pipeline.sampling.inclusion import InclusionRule
from tests.unit.loss.dense_head import D, MakeTargets, N, V, dense, inputs


class TinyModel(nn.Module):
    """Embedding, one nonlinearity, head; optionally tied; transforms as real models do."""

    def __init__(self, *, tied: bool = False, head: nn.Module | None = None, **config: Any) -> None:
        """Build with double precision so that comparisons are exact."""
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.lm_head = head or nn.Linear(D, V, bias=False, dtype=torch.float64)
        if tied:
            self.lm_head.weight = self.embed.weight  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """As in transformers."""
        return self.lm_head

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Return [B, T, D]."""
        return torch.tanh(self.embed(input_ids))

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        """Return logits, transformed as Granite and Gemma do."""
        logits = self.lm_head(self.hidden(input_ids))
        logits = logits / getattr(self.config, "logits_scaling", 1.0)
        logits = logits * getattr(self.config, "unheard_of", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return SimpleNamespace(logits=cap * torch.tanh(logits / cap) if cap else logits)


def settings(**changes: Any) -> LossSettings:
    """Return settings with small chunks."""
    return LossSettings.model_validate({"chunk_rows": 3, **changes})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"logits_scaling": 8.0}, {"logits_scaling": 0.5, "final_logit_softcapping": 2.0}]
)
def test_installed_head_is_the_models_loss(
    make_targets: MakeTargets, generator: torch.Generator, tied: bool, config: dict[str, float]
) -> None:
    """Same loss and parameter gradients as the reference on the model's own logits."""
    torch.manual_seed(0)
    model = TinyModel(tied=tied, **config)
    head = install_distill_head(model, settings())
    check_distill_head(model)
    ids = torch.randint(0, V, (N,), generator=generator)
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=2.0)
    terms = head(model.hidden(ids), targets)
    assert isinstance(terms, LossTerms)
    terms.loss.backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss = reference.loss_sum(model(ids).logits, targets, LossSpec(2.0, 0.5))
    loss.backward()
    torch.testing.assert_close(terms.loss.detach(), loss.detach())
    assert len(got) == (1 if tied else 2)
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_temperature_and_predictions_of_one_call(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    """Evaluation may request another temperature, and the student's predictions."""
    model = TinyModel()
    head = install_distill_head(model, settings())
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=1.0)
    hidden = torch.randn(N, D, dtype=torch.float64)
    with torch.no_grad():
        terms = head(hidden, targets, temperature=1.0, predictions=True)
        logits = head(hidden)
    assert isinstance(terms, LossTerms)
    assert isinstance(logits, Tensor)
    divergence_N = reference.sparse_divergence(logits, targets, LossSpec(1.0, 0.5))
    torch.testing.assert_close(terms.divergence_N, divergence_N)
    assert terms.argmax_N is not None
    assert torch.equal(terms.argmax_N, logits.argmax(-1))
    assert not terms.loss.requires_grad


def test_every_setting_reaches_the_loss() -> None:
    """A dropped setting would silently train something else."""
    chosen = {
        "temperature": 3.0, "alpha": 0.2, "divergence": "skew_kl", "jsd_beta": 0.3,
        "skew_alpha": 0.4, "tail": "control_variate", "control_variate": 0.6,
    }  # fmt: skip
    head = install_distill_head(TinyModel(), settings(**chosen), sampled_log_step=0.5)
    assert head.spec.loss == LossSpec(**chosen, sampled_log_step=0.5)
    across = install_distill_head(TinyModel(), settings(temperature=1.0, cross_tokenizer="uld"))
    assert across.spec.loss.cross_tokenizer == "uld"
    on_policy = {"temperature": 1.0, "divergence": "sampled_reverse_kl", "importance_clip": 2.0}
    written = install_distill_head(TinyModel(), settings(**on_policy))
    assert written.spec.loss == LossSpec(alpha=0.5, **on_policy)
    unused = set(LossSettings.model_fields) - set(chosen) - {"cross_tokenizer", "importance_clip"}
    weights = {"weight", "weight_temperature", "weight_quantile"}  # of the step, not of the head
    assert unused == {"chunk_rows", "compile_entries", "uncached_temperature"} | weights
    assert not install_distill_head(
        TinyModel(), settings(compile_entries=False)
    ).spec.compile_entries


def test_measuring_is_not_training(draw_targets: Callable[..., HeadTargets]) -> None:
    """Evaluation is the forward KL, unbiased on a sample, whatever the loss and its tail."""
    model = TinyModel()
    log_p_V = torch.log_softmax(torch.randn(V, dtype=torch.float64), -1)
    rule = InclusionRule((1.0,), (1 / 6,))
    targets = draw_targets(log_p_V.numpy(), rule, temperature=1.0, draws=30, seed=0)
    targets = targets._replace(entropy_N=torch.special.entr(log_p_V.exp()).sum().expand(30))
    hidden = torch.randn(30, D, dtype=torch.float64)
    seen = []
    for changes in ({}, {"divergence": "skew_kl", "tail": "bucket", "temperature": 1.0}):
        head = install_distill_head(model, settings(**changes), sampled_log_step=0.5)
        with torch.no_grad():
            terms = head(hidden, targets, temperature=1.0)
            logits = head(hidden)
        assert isinstance(terms, LossTerms)
        assert isinstance(logits, Tensor)
        seen.append(terms.divergence_N)
    assert torch.equal(*seen)
    spec = LossSpec(1.0, 0.5, "control_variate", sampled_log_step=0.5)
    torch.testing.assert_close(seen[0], reference.sparse_divergence(logits, targets, spec))


def test_state_dict_and_reinstall() -> None:
    """The class changes, the parameters' names do not; new settings replace the old."""
    model = TinyModel()
    names = list(model.state_dict())
    head = install_distill_head(model, settings())
    assert list(model.state_dict()) == names
    assert install_distill_head(model, settings(alpha=1.0)) is head
    assert type(model.lm_head) is DistillHead
    assert head.spec.loss.alpha == 1.0


def test_refusals() -> None:
    """No head, a foreign head, too few rows, an unknown transform."""
    with pytest.raises(ModelError, match="NoneType"):
        install_distill_head(nn.Linear(2, 2), settings())
    with pytest.raises(ModelError, match="Bilinear"):
        install_distill_head(TinyModel(head=nn.Bilinear(2, 2, 2)), settings())
    with pytest.raises(ModelError, match="23 rows"):
        install_distill_head(TinyModel(), settings(), valid_vocab=24)
    model = TinyModel(unheard_of=4.0)
    install_distill_head(model, settings())
    with pytest.raises(ModelError, match="LogitTransform"):
        check_distill_head(model)
    install_distill_head(model, settings(), transform=LogitTransform(scale=4.0))
    check_distill_head(model)


def test_transforms_of_known_models() -> None:
    """The same key divides in one family and multiplies in another."""
    assert logit_transform(SimpleNamespace()) == LogitTransform()
    assert logit_transform(None) == LogitTransform()
    granite = SimpleNamespace(model_type="granite", logits_scaling=16.0)
    assert logit_transform(granite).scale == 1 / 16
    other = SimpleNamespace(model_type="hyperclovax", logits_scaling=0.125)
    assert logit_transform(other).scale == 0.125
    assert logit_transform(SimpleNamespace(logit_scale=0.0625)).scale == 0.0625
    assert logit_transform(SimpleNamespace(logit_scale="inv_sqrt_d_model")).scale == 1.0
    assert logit_transform(SimpleNamespace(final_logit_softcapping=30.0)).softcap == 30.0
    nested = SimpleNamespace(get_text_config=lambda: granite)
    assert logit_transform(nested).scale == 1 / 16


def test_settings_import_no_torch() -> None:
    """`--help` imports the settings; torch takes seconds to import."""
    import subprocess
    import sys

    code = "import pipeline.loss.settings, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_logit_scale_scales_the_bias_too(
    make_targets: MakeTargets, generator: torch.Generator
) -> None:
    """The model multiplies the head's whole output, its bias included."""
    targets, _ = make_targets(generator, tokens=N, vocab=V, temperature=2.0)
    hidden, weight, bias = inputs(generator)
    head = nn.Linear(D, V, dtype=torch.float64)
    head.weight, head.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    model: Any = SimpleNamespace(get_output_embeddings=lambda: head)
    settings = LossSettings(temperature=2.0, alpha=0.5)
    install_distill_head(model, settings, transform=LogitTransform(scale=0.25))
    terms = head(hidden, targets)
    terms.loss.backward()
    loss, hidden_gradient, *gradients = dense(
        hidden * 0.25,
        weight,
        bias * 0.25,
        targets,
        head.spec,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(terms.loss.detach(), loss)
    expected = (hidden_gradient * 0.25, gradients[0], gradients[1] * 0.25)
    for tensor, gradient in zip((hidden, head.weight, head.bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
