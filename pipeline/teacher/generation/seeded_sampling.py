"""Sampling by Gumbel-max with counter-based noise: a draw hangs on its seed and step alone.

`argmax(logits + noise)` with independent Gumbel noise is a draw from softmax(logits) (Gumbel 1954;
Maddison, Tarlow and Minka, "A* sampling", 2014). The noise of token v at step t of a response is a
hash of (seed, t, v), the finaliser of SplitMix64 as in `pipeline.data.order.permutation`, so
neither the other rows of a batch nor their order enter. It is computed where the logits are, in
64-bit integers and float64. A running sum of probabilities would need one random number only, but
CUDA's cumsum is not deterministic.

Shape suffixes: B responses of a batch, L tokens so far, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.teacher.generation.settings import GenerateSettings

if TYPE_CHECKING:
    import torch

__all__ = ["SeededSampler", "gumbel_noise", "likeliest"]

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class SeededSampler:
    """A logits processor of transformers after which greedy search is a seeded draw.

    Filters are transformers' own, in vLLM's order (temperature, min-p, top-k, top-p), so that both
    engines draw from one inclusion rule.
    """

    def __init__(
        self,
        settings: GenerateSettings,
        seeds_B: torch.Tensor,
        *,
        prompt_length: int,
        vocabulary: int,
    ) -> None:
        """Take the seeds of one batch.

        Args:
            settings: temperature and filters.
            seeds_B: int64, on the logits' device.
            prompt_length: of the padded prompts; the step is counted from there.
            vocabulary: ids from here on are padding of the head and are never drawn.
        """
        self._vocabulary = vocabulary
        self._seeds_B = seeds_B
        self._prompt_length = prompt_length
        self._greedy = settings.temperature == 0
        self._filters = [] if self._greedy else _filters(settings)
        self._recorded: list[torch.Tensor] | None = [] if settings.record_logprobs else None
        self._top_k = min(settings.record_top_k, vocabulary)
        self._top_ids: list[torch.Tensor] = []

    def __call__(self, input_ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Return scores whose largest is the drawn token; float64 [B, V]."""
        step = input_ids_BL.shape[1] - self._prompt_length
        logits_BV = scores_BV.float().clone()
        logits_BV[:, self._vocabulary :] = float("-inf")
        for keep in self._filters:
            logits_BV = keep(input_ids_BL, logits_BV)
        sampled_BV = logits_BV.double()
        if not self._greedy:
            sampled_BV += gumbel_noise(self._seeds_B, step, scores_BV.shape[1])
        if self._recorded is not None:
            chosen_B1 = sampled_BV.argmax(-1, keepdim=True)
            raw_BV = scores_BV.float()
            chosen_B = raw_BV.gather(-1, chosen_B1).squeeze(-1)
            self._recorded.append(chosen_B - raw_BV.logsumexp(-1))
        if self._top_k:
            self._top_ids.append(likeliest(scores_BV[:, : self._vocabulary].float(), self._top_k))
        return sampled_BV

    def top_ids(self) -> torch.Tensor | None:
        """Return int64 [B, steps, K], falling; None where they are not recorded."""
        import torch

        return torch.stack(self._top_ids, dim=1) if self._top_k else None

    def logprobs(self) -> torch.Tensor | None:
        """Return float32 [B, steps] of the drawn tokens, None where they are not recorded."""
        import torch

        return None if self._recorded is None else torch.stack(self._recorded, dim=1)


def likeliest(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ids of the k largest logits, falling, of equal ones the lowest; int64 [B, k]."""
    import torch

    logits_BV = torch.nan_to_num(logits_BV, nan=float("-inf"))
    least_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    above_BV = logits_BV > least_B1
    equal_BV = logits_BV == least_B1
    room_B1 = k - above_BV.sum(-1, keepdim=True)
    chosen_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))
    ids_BK = chosen_BV.nonzero()[:, 1].view(-1, k)
    order_BK = logits_BV.gather(-1, ids_BK).sort(dim=-1, descending=True, stable=True).indices
    return ids_BK.gather(-1, order_BK)


def gumbel_noise(seeds_B: torch.Tensor, step: int, vocabulary: int) -> torch.Tensor:
    """Return standard Gumbel noise, float64 [B, V], for int64 seeds [B] and one step."""
    import torch

    keys_B = _mix(seeds_B + _signed(_GAMMA * (step + 1)))
    tokens_V = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=seeds_B.device)
    bits_BV = _mix(keys_B.unsqueeze(1) + tokens_V * _signed(_GAMMA))
    # 52 bits and a half: never 0 nor 1, and exact in float64.
    uniform_BV = (_shift(bits_BV, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_BV))


def _filters(settings: GenerateSettings) -> list[Any]:
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    filters: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.min_p > 0:
        filters.append(MinPLogitsWarper(settings.min_p))
    if settings.top_k > 0:
        filters.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        filters.append(TopPLogitsWarper(settings.top_p))
    return filters


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts int64 with its sign; the mask takes the copies of the sign away.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the bits of `value` modulo 2^64; torch's products wrap around."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
