"""Which failures of a store pass by themselves: of a mount, of a connection, of a busy server."""

from __future__ import annotations

import errno

__all__ = ["FULL", "is_throttled", "may_pass", "status_passes"]

_THROTTLED = (
    "slowdown", "slow down", "throttl", "toomanyrequests", "too many requests", "rate exceeded",
    "requestlimitexceeded", "serverbusy", "reduce your request rate",
)  # fmt: skip
# Errors of a network mount while its server is unreachable; other local errors are permanent.
_PASSING = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT,
        errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
    }
)  # fmt: skip
# Answers of the store and bugs, not failures of the connection: a retry would only repeat
# them.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    TypeError,
    AttributeError,
)
FULL = (errno.ENOSPC, errno.EDQUOT)


def may_pass(error: Exception, *, local: bool) -> bool:
    """Whether another attempt may succeed.

    Args:
        error: what the file system raised.
        local: whether it is a local or mounted one.
    """
    if isinstance(error, _FINAL):
        return False
    # The answer of a server over HTTP that another request would not change.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and status >= 400 and not status_passes(status):
        return False
    number = getattr(error, "errno", None)
    return number in _PASSING if local else number not in FULL


def status_passes(status: int) -> bool:
    """Whether a later request may get another answer than this one of HTTP."""
    return status >= 500 or status in (408, 425, 429)


def is_throttled(error: Exception) -> bool:
    """Whether the store asks for fewer requests."""
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in _THROTTLED)
