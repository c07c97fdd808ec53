"""Addresses that hold a secret, which would be written to caches, cards, logs and reports."""

from __future__ import annotations

import re

__all__ = ["PLAIN_ADDRESS", "has_secret"]

PLAIN_ADDRESS = (
    "a plain one; credentials belong into the environment or the store's own configuration, "
    "because addresses are written to caches, cards, logs and reports"
)
"""What is expected instead."""
_SECRET = re.compile(
    r"://[^/\s:@]+:[^/\s@]+@"
    r"|://\S*[?&](x-amz-signature|x-amz-security-token|x-goog-signature|signature|sig|token"
    r"|access_token|api_?key|password)=",
    re.IGNORECASE,
)


def has_secret(text: str) -> bool:
    """Whether a text holds an address with a password, or one that is signed or carries a key."""
    return _SECRET.search(text) is not None
