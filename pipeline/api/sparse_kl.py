"""The distillation loss as a function of hidden states or logits, and of a batch's targets.

Shapes: T tokens of all sequences in a row, N supervised tokens, D hidden, V rows of the head.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from pipeline.api.targets import TeacherTargets
from pipeline.config.mistakes import validated
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError
from pipeline.loss.fused import FusedSpec, fused_head_loss
from pipeline.loss.head import LogitTransform, logit_transform
from pipeline.loss.logits import logits_loss
from pipeline.loss.settings import Divergence, LossSettings, TailPolicy
from pipeline.loss.spec import LossSpec
from pipeline.student.compatibility import check_compatibility

__all__ = ["sparse_kl", "sparse_kl_of_logits"]

Reduction = Literal["mean", "sum"]


def sparse_kl(
    hidden: Tensor,
    head: Any,
    targets: TeacherTargets,
    *,
    alpha: float = 1.0,
    divergence: Divergence = "forward_kl",
    tail: TailPolicy = "auto",
    chunk_rows: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return `alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE` over the supervised tokens.

    No [N, V] array is held: logits are computed `chunk_rows` tokens at a time, and their gradient
    in the forward pass (`pipeline.loss.fused`). The head's weight must be whole: where a wrapper
    (DistributedDataParallel, ZeRO 3, FSDP) must see the head's forward pass, use
    `sparse_kl_of_logits`.

    Args:
        hidden: last hidden states, [1, T, D] or [T, D] of the whole batch, or [N, D] picked.
        head: the causal language model itself, whose head, logit scale and soft cap are used; or a
            linear layer; or a weight [V, D].
        targets: of the batch, on the same device.
        alpha: share of the divergence; the rest is cross-entropy.
        divergence: D.
        tail: what is known of a top-k target's tail; see `LossSettings`.
        chunk_rows: tokens a chunk; none chooses, as the trainer does.
        reduction: over the N tokens. With gradient accumulation, or on several ranks, take `sum`
            and divide by the tokens of the global batch.

    Returns:
        A scalar; 0 without supervised tokens.

    Raises:
        ConfigError: shapes that do not fit the batch, a head that is none of these, or fewer rows
            of it than the cache's tokenizer has tokens.
    """
    weight_VD, bias_V, transform = _head(head)
    _check_rows(weight_VD.shape[0], targets)
    hidden_ND = targets.pick(hidden)
    if transform.scale != 1.0:
        hidden_ND = hidden_ND * transform.scale
        bias_V = None if bias_V is None else bias_V * transform.scale
    terms = fused_head_loss(
        hidden_ND,
        weight_VD,
        bias_V,
        targets.entries,
        spec=FusedSpec(
            loss=_spec(targets, alpha, divergence, tail),
            chunk_rows=chunk_rows,
            softcap=transform.softcap,
            valid_vocab=targets.vocab_size,
        ),
    )
    return _reduced(terms.loss, targets, reduction)


def sparse_kl_of_logits(
    logits: Tensor,
    targets: TeacherTargets,
    *,
    alpha: float = 1.0,
    divergence: Divergence = "forward_kl",
    tail: TailPolicy = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the loss of `sparse_kl` from logits that a model's own forward pass returned.

    `model(..., logits_to_keep=targets.index_N)` returns those of the supervised tokens alone.

    Args:
        logits: [1, T, V] or [T, V] of the whole batch, or [1, N, V] or [N, V] picked.
        targets: of the batch, on the same device.
        alpha: as in `sparse_kl`.
        divergence: as in `sparse_kl`.
        tail: as in `sparse_kl`.
        reduction: as in `sparse_kl`.

    Raises:
        ConfigError: shapes that do not fit the batch, or fewer columns than the cache's tokenizer
            has tokens.
    """
    _check_rows(logits.shape[-1], targets)
    spec = _spec(targets, alpha, divergence, tail)
    terms = logits_loss(
        targets.pick(logits), targets.entries, spec=spec, valid_vocab=targets.vocab_size
    )
    return _reduced(terms.loss, targets, reduction)


def _head(head: Any) -> tuple[Tensor, Tensor | None, LogitTransform]:
    if isinstance(head, Tensor):
        return head, None, LogitTransform()
    transform = LogitTransform()
    if hasattr(head, "get_output_embeddings"):
        transform = logit_transform(getattr(head, "config", None))
        head = head.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"a head of type {type(head).__name__}",
            expected="a causal language model, a torch.nn.Linear, or its weight",
        )
    return head.weight, head.bias, transform


def _check_rows(rows: int, targets: TeacherTargets) -> None:
    if rows < targets.vocab_size:
        raise ConfigError(
            f"a head of {rows} rows",
            expected=f"at least the {targets.vocab_size} tokens of the cache's tokenizer",
            do="choose a student of that tokenizer, or train with train_student, which maps "
            "vocabularies",
        )


def _spec(
    targets: TeacherTargets, alpha: float, divergence: Divergence, tail: TailPolicy
) -> LossSpec:
    # As the trainer's settings are checked: one message with all mistakes.
    settings = validated(
        LossSettings,
        {
            "temperature": targets.temperature,
            "alpha": alpha,
            "divergence": divergence,
            "tail": tail,
        },
    )
    check_compatibility(settings, DataSettings(), grid=[targets.temperature], rule=targets.rule)
    return LossSpec(
        temperature=settings.temperature,
        alpha=settings.alpha,
        tail=settings.tail,
        divergence=settings.divergence,
        jsd_beta=settings.jsd_beta,
        skew_alpha=settings.skew_alpha,
        importance_clip=settings.importance_clip,
        sampled_log_step=targets.sampled_log_step,
        rule_highest=targets.rule.highest if targets.rule else 0.0,
    )


def _reduced(loss: Tensor, targets: TeacherTargets, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction {reduction!r}", expected="mean or sum")
    return loss / max(1, len(targets)) if reduction == "mean" else loss
