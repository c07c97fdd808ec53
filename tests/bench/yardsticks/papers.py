"""What the papers report for the same comparisons, each with its table and setting.

RS-KD (Anshumann et al., 2503.16870): 3B to 300M, pre-training; tables as the authors' slides and
poster show them (github.com/akhilkedia/RandomSamplingKD, ACL_poster). SE-KD (Tavor et al.,
2602.01395): Qwen3 8B to 1.7B, 80M tokens, README of github.com/almogtavor/SE-KD3x. Minitron: table
1 of 2407.14679 as an earlier README of github.com/NVlabs/Minitron has it (Nemotron-4 15B), and the
table of benchmarks of 2408.11796 (Llama 3.1 8B to 4.5B). What was not found is None: nothing is
from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NOT_FOUND", "OTHERS", "RS_KD", "Reported"]

NOT_FOUND = "not found"


@dataclass(frozen=True, slots=True)
class Reported:
    """RS-KD's figures of one target; None: not found."""

    angle: float | None = None
    """Degrees; table 3, as `ratio`."""
    ratio: float | None = None
    loss: float | None = None
    gap_closed: float | None = None
    """By held-out loss, of the way from cross-entropy to dense."""
    ece: float | None = None
    note: str = ""


RS_KD = {
    "cross-entropy alone": Reported(loss=2.81, gap_closed=0.0, ece=0.012),
    "dense": Reported(0.0, 1.0, 2.75, 1.0, 0.007),
    "top-12 truncated": Reported(58, 2.4, 2.87, -0.99, 0.047),
    "top-50 truncated": Reported(48, 1.8, 2.80, 0.05, 0.022),
    "top-64 + bucket": Reported(None, None, 2.77, 0.59, 0.004, "ghost token, k not said"),
    "12 draws": Reported(None, None, 2.75, None, 0.011, "5.0 different ids"),
    "50 draws": Reported(4, 1.0, 2.75, None, 0.008, "12.1 different ids"),
    "256 draws renormalised": Reported(note="Gemma 3's report compares with nothing"),
}

OTHERS = {
    "dense": "SE-KD: perplexity 7.3, accuracy 64.4, ECE 27.3 %",
    "20 % by student entropy": "SE-KD: perplexity 6.9, accuracy 64.8, ECE 27.6 %",
    "20 % by teacher entropy": NOT_FOUND,
    "20 % at random": NOT_FOUND,
    "depth": "Minitron: loss 2.155 (table 1); MMLU 58.7",
    "width": "Minitron: loss 2.049 (table 1); MMLU 60.5",
    "depth, reconstructed": "none: this project's",
    "depth, adapted teacher": NOT_FOUND,
    "width, adapted teacher": NOT_FOUND,
    "reverse KL": "Minitron: worse than forward KL (tables 15 and 16); figures not found",
    "Jensen-Shannon": NOT_FOUND,
}
