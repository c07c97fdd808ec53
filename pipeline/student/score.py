"""Score any student on the held-out rows of a cache, in one process and without a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cache.io.reader import Cache
from pipeline.data.collate import Batch
from pipeline.data.stream.heldout_stream import heldout_stream
from pipeline.data.transfer import Transfer
from pipeline.errors import CacheError, Mistakes
from pipeline.evaluate.heldout import merge_scores, score_batches
from pipeline.evaluate.measures import HeldoutScores
from pipeline.loss.settings import LossSettings
from pipeline.models.device import uses_gpu
from pipeline.student.build.model import load_student
from pipeline.student.build.vocabulary import StudentVocabulary, open_vocabulary
from pipeline.student.compatibility import sampled_facts
from pipeline.student.forward.attention import attention_order, settle_attention
from pipeline.student.forward.choice import choose_way
from pipeline.student.metric_names import kl_name
from pipeline.student.training.module import StudentModule, module_inputs

__all__ = ["distance_in", "score_on_caches"]

_log = logging.getLogger(__name__)
_TOKENS = 2048


def distance_in(cache: Cache) -> str:
    """Return what the KL over held-out targets is: `kl`, or the lower bound `kl_bucketed`."""
    return kl_name(sampled=cache.heldout_rule is not None)


def score_on_caches(
    folder: Path, caches: Mapping[str, Cache], *, dtype: str
) -> dict[str, HeldoutScores]:
    """Return the scores of one student on the held-out rows of several caches, at temperature 1.

    The model is loaded once. It sees what training would let it see: sequences packed where its
    trial allows that, one at a time elsewhere.

    Args:
        folder: the student, as `save_pretrained` writes it.
        caches: by a name of the caller's.
        dtype: of its weights here: `float32`, `bfloat16` or `float16`.

    Raises:
        CacheError: a cache holds nothing out.
        ModelError: the folder cannot be loaded, or has another vocabulary than a cache.
    """
    mistakes = Mistakes()
    vocabularies: dict[str, StudentVocabulary] = {}
    for name, cache in caches.items():
        with mistakes.collected():
            if not cache.manifest.of_split("heldout"):
                raise CacheError(
                    f"{cache.store.url}: holds nothing out, so there is nothing to score on",
                    expected="a cache made with --corpus.heldout_fraction above 0",
                )
        with mistakes.collected():
            vocabularies[name] = open_vocabulary(folder, cache, cross_tokenizer="reject")
    mistakes.raise_any()
    longest = max(vocabulary.pack_length() for vocabulary in vocabularies.values())
    module, device = _load(folder, dtype=dtype, longest=longest)
    scores = {}
    for name, vocabulary in vocabularies.items():
        scores[name] = _score(module, vocabulary, device=device)
        _log.info("scored on the held-out rows of %s", vocabulary.cache.store.url)
    return scores


def _load(folder: Path, *, dtype: str, longest: int) -> tuple[StudentModule, Any]:
    """Load the student and choose how sequences go through it."""
    import torch

    on_gpu = uses_gpu()
    device = torch.device("cuda" if on_gpu else "cpu")
    order = attention_order("auto", dtype, on_gpu=on_gpu)
    model = load_student(folder, dtype=dtype, attention=order).to(device).eval()
    module = StudentModule(model)
    settle_attention(model, module.body, order, device=device, gather=_alone)
    choose_way(
        module.body,
        model,
        wanted="auto",
        before=None,
        device=device,
        gather=_alone,
        longest_row=max(_TOKENS, longest),
        longest_sequence=longest,
    )
    return module, device


def _score(module: StudentModule, vocabulary: StudentVocabulary, *, device: Any) -> HeldoutScores:
    import torch

    from pipeline.loss.head import install_distill_head

    step, highest = sampled_facts(vocabulary.cache)
    install_distill_head(
        module.model,
        LossSettings(temperature=1.0),
        valid_vocab=vocabulary.size,
        sampled_log_step=step,
        rule_highest=highest,
    )
    transfer = Transfer(device)

    def forward(batch: Batch) -> Any:
        inputs = module_inputs(transfer.move(batch), scale=1.0)
        return module(**inputs, predictions=True, temperature=1.0)[1]

    with (
        torch.no_grad(),
        heldout_stream(
            vocabulary.heldout,
            tokens_per_batch=max(_TOKENS, vocabulary.pack_length()),
            temperature=1.0,
            rank=0,
            world_size=1,
        ) as batches,
    ):
        return merge_scores([score_batches(batches, forward)])


def _alone(value: Any) -> list[Any]:
    return [value]
