"""The student's head with the loss inside it, so that ZeRO-3 gathers the weight for both.

Shapes: N supervised tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.settings import LossSettings
from pipeline.loss.spec import LossSpec
from pipeline.loss.targets import HeadTargets, LossTerms

__all__ = [
    "DistillHead",
    "LogitTransform",
    "check_distill_head",
    "install_distill_head",
    "logit_transform",
]


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model's forward does to the head's output to obtain the logits."""

    scale: float = 1.0
    softcap: float | None = None


class DistillHead(nn.Linear):
    """A linear head that returns the loss when targets are given, and logits otherwise.

    Made by `install_distill_head`, which gives an existing `nn.Linear` this class: parameters,
    hooks, tying and state-dict names stay as they are.
    """

    spec: FusedSpec
    logit_scale: float

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        targets: HeadTargets | None = None,
        *,
        temperature: float | None = None,
        predictions: bool = False,
    ) -> Tensor | LossTerms:
        """Return logits of any shape [..., V], or the loss of N tokens.

        Args:
            input: hidden states; [N, D] of the supervised tokens when `targets` are given.
            targets: of the same N tokens; None makes this the plain linear layer.
            temperature: measure instead of train: the forward KL at this temperature (that of
            `targets.log_z_N`), with the least biased tail policy, whatever divergence and tail
            policy the settings name.
            predictions: also return the argmax and its log-probability.
        """
        if targets is None:
            return functional.linear(input, self.weight, self.bias)
        spec = self.spec
        if temperature is not None:
            spec = replace(spec, loss=spec.loss.for_measuring(temperature))
        hidden_ND, bias_V = input, self.bias
        if self.logit_scale != 1.0:
            # Scaling the hidden state scales the logits, and costs D instead of V per token.
            hidden_ND = hidden_ND * self.logit_scale
            bias_V = cast(Any, bias_V * self.logit_scale if bias_V is not None else None)
        return fused_head_loss(
            hidden_ND, self.weight, bias_V, targets, spec=spec, predictions=predictions
        )


def install_distill_head(
    model: nn.Module,
    settings: LossSettings,
    *,
    valid_vocab: int | None = None,
    transform: LogitTransform | None = None,
    sampled_log_step: float = 0.0,
    rule_highest: float = 0.0,
) -> DistillHead:
    """Turn a causal language model's output head into a `DistillHead`, in place.

    Call it before `deepspeed.initialize`. Installing again replaces the settings.

    Args:
        model: a transformers model, or anything with `get_output_embeddings()`.
        settings: temperature, alpha, tail policy, chunk size.
        valid_vocab: tokens of the tokenizer; head rows from here on are padding and get no mass
            and no gradient. None: all rows are valid.
        transform: what the model does to the head's output; None reads the model's config.
        sampled_log_step: of the cache (`cache_sampled_step`); see `LossSpec`.
        rule_highest: of the cache's inclusion rule.

    Raises:
        ModelError: the model has no linear output head, or fewer rows than `valid_vocab`.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if type(head) not in (nn.Linear, DistillHead):
        raise ModelError(
            f"the student's output head is {type(head).__name__}",
            expected="a plain torch.nn.Linear (no adapter, no quantised layer)",
            do="choose a causal language model, and merge adapters into it first",
        )
    distill_head = cast(DistillHead, head)
    # Under ZeRO-3 the weight may be partitioned to size 0; the layer knows its own size.
    if valid_vocab is not None and valid_vocab > distill_head.out_features:
        raise ModelError(
            f"the student's head has {distill_head.out_features} rows",
            expected=f"at least the vocabulary's {valid_vocab}",
            do="choose a student of the cache's tokenizer, or resize its embeddings",
        )
    if transform is None:
        transform = logit_transform(getattr(model, "config", None))
    distill_head.__class__ = DistillHead
    distill_head.logit_scale = transform.scale
    distill_head.spec = FusedSpec(
        loss=LossSpec(
            temperature=settings.temperature,
            alpha=settings.alpha,
            tail=settings.tail,
            divergence=settings.divergence,
            control_variate=settings.control_variate,
            jsd_beta=settings.jsd_beta,
            skew_alpha=settings.skew_alpha,
            importance_clip=settings.importance_clip,
            cross_tokenizer=settings.cross_tokenizer,
            sampled_log_step=sampled_log_step,
            rule_highest=rule_highest,
        ),
        chunk_rows=settings.chunk_rows,
        softcap=transform.softcap,
        valid_vocab=valid_vocab,
        compile_entries=settings.compile_entries,
    )
    return distill_head


def logit_transform(config: object) -> LogitTransform:
    """Read scale and soft cap of the logits from a transformers config.

    Known: Granite's `logits_scaling` (divides, but multiplies in HyperCLOVA X), Cohere's
    `logit_scale` and Falcon-H1's `lm_head_multiplier` (multiply), Gemma's
    `final_logit_softcapping` (`logits_soft_cap` in RecurrentGemma, `output_logit_soft_cap` in
    xLSTM). `check_distill_head` finds out whether the model does anything else.
    """
    text_config = getattr(config, "get_text_config", lambda: config)()
    scaling = _number(text_config, "logits_scaling", 1.0)
    multiplies = "hyperclovax" in str(getattr(text_config, "model_type", ""))
    scale = scaling if multiplies else 1.0 / scaling
    scale *= _number(text_config, "logit_scale", 1.0)
    scale *= _number(text_config, "lm_head_multiplier", 1.0)
    softcap = max(_number(text_config, name, 0.0) for name in _SOFTCAPS)
    return LogitTransform(scale=scale, softcap=softcap or None)


def check_distill_head(model: nn.Module, *, device: torch.device | str | None = None) -> None:
    """Run a few tokens and compare the model's own logits with those the loss would use.

    Works before and after `deepspeed.initialize` (pass the engine's module), on all ranks at
    once under ZeRO-3.

    Raises:
        ModelError: the model changes its head's output in an unknown way.
    """
    head = cast(Any, model).get_output_embeddings()
    raw: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: raw.append(output))
    training = model.training
    model.eval()
    try:
        ids_1T = torch.arange(4, device=device)[None, :]
        with torch.no_grad():
            logits = model(input_ids=ids_1T, use_cache=False).logits.double()
    finally:
        hook.remove()
        model.train(training)
    expected = raw[-1].double() * head.logit_scale
    if head.spec.softcap is not None:
        expected = head.spec.softcap * torch.tanh(expected / head.spec.softcap)
    error = float((logits - expected).abs().max() / logits.abs().max().clamp(min=1e-6))
    if not error < 0.02:  # bfloat16 keeps 8 bits; a forgotten scale is off by far more
        raise ModelError(
            f"the student's logits are not its head's output (they differ by {error:.0%})",
            expected=f"head output times {head.logit_scale:g}, soft cap {head.spec.softcap}",
            do="pass install_distill_head the model's LogitTransform",
        )


def _number(config: object, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else default
