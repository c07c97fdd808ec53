"""Lightning-OPD: no row, because it has no target of a distribution to compare.

It stores one log-prob of each token of the student's own responses, asked of the teacher once, and
takes teacher minus student of that token as the advantage of a policy gradient. That is an estimate
of the reverse KL over the student's samples: on given text it is not an estimate of the forward
KL's gradient, and its error against it would say nothing of it. Its loss also needs Megatron, Ray
and SGLang.
"""

from __future__ import annotations

from tests.bench.peers.checkout import Checkout, Project
from tests.bench.peers.seam import Peer

__all__ = ["NO_ROW", "PROJECT", "peers"]

PROJECT = Project(
    "lightning-opd", "Lightning-OPD", "https://github.com/jet-ai-projects/Lightning-OPD",
    ("data_curation/prepare_lightning_opd.py", "slime/rollout/on_policy_distillation.py"),
)  # fmt: skip
NO_ROW = (
    "stores one log-prob of each token that the student wrote, for a policy gradient of the "
    "reverse KL: no target to compare with the forward KL's gradient on given text"
)


def peers(checkout: Checkout, vocabulary: int) -> list[Peer]:
    """Return no row."""
    del checkout, vocabulary
    return []
