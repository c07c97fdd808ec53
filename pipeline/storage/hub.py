"""Data sets on the hub: their files with digests, commits of files, failures that are retried."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import ConfigError, StoreError
from pipeline.storage.faults import status_passes

__all__ = ["HUB", "Digest", "HubDataset", "is_hub_address", "reason_of", "retried"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
HUB = "hf://"
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?((?:/[^/]+)*)/?")
_ATTEMPTS = 5
_FIRST_WAIT_S = 2.0
_LONGEST_WAIT_S = 60.0


def is_hub_address(url: str) -> bool:
    """Whether an address is one of the hub's."""
    return url.startswith(HUB)


@dataclass(frozen=True, slots=True)
class Digest:
    """What the hub tells of a file's content: of a large one SHA-256, of a small one git's."""

    size: int
    sha256: str = ""
    git_sha1: str = ""

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """Return both digests of a content."""
        blob = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
        blob.update(data)
        return cls(len(data), hashlib.sha256(data).hexdigest(), blob.hexdigest())

    def fits(self, other: Digest | None) -> bool:
        """Whether the other is of the same content, by a digest that both have."""
        if other is None or self.size != other.size:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return bool(self.git_sha1) and self.git_sha1 == other.git_sha1


class HubDataset:
    """One data set on the hub, to be written to; each call is retried after failures that pass."""

    def __init__(self, url: str) -> None:
        """Take an address such as `hf://datasets/owner/name`; touches nothing.

        Raises:
            ConfigError: it names no data set, or there is no token.
        """
        found = _DATASET.fullmatch(url)
        if found is None:
            raise ConfigError(
                f"{url}: names no data set of the hub",
                expected="hf://datasets/OWNER/NAME, with @BRANCH and /FOLDER where they are wanted",
            )
        self.url = url
        self.repository, self._revision = found[1], found[2]
        self._folder = found[3].strip("/")
        try:
            from huggingface_hub import HfApi, get_token
        except ImportError:
            raise ConfigError(
                f"{url}: the package huggingface-hub is not installed here",
                expected="it, as in the environments of both stages",
            ) from None
        if get_token() is None:
            raise ConfigError(
                f"{url}: a push to the hub needs a token, and there is none",
                expected="HF_TOKEN with the right to write, or a login by `hf auth login`",
            )
        self._api = HfApi()

    def create(self, *, private: bool | None) -> None:
        """Make the data set unless it is there; `private` None: as the account has it."""
        self._try(
            lambda: self._api.create_repo(
                self.repository, repo_type="dataset", private=private, exist_ok=True
            )
        )

    def listing(self) -> dict[str, Digest]:
        """Return every file below the folder, by its name relative to it, with its digest."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        def call() -> dict[str, Digest]:
            found: dict[str, Digest] = {}
            for item in self._api.list_repo_tree(
                self.repository,
                self._folder or None,
                recursive=True,
                revision=self._revision,
                repo_type="dataset",
            ):
                if not isinstance(item, RepoFile):
                    continue  # a folder
                large = item.lfs
                sha256 = "" if large is None else str(large.sha256)
                name = item.path.removeprefix(f"{self._folder}/" if self._folder else "")
                found[name] = Digest(int(item.size), sha256, "" if large else str(item.blob_id))
            return found

        try:
            return self._try(call)
        except EntryNotFoundError:
            return {}

    def commit(self, files: Mapping[str, bytes | str], message: str) -> None:
        """Add or replace files in one commit, which is there as a whole or not at all.

        Args:
            files: by name relative to the folder, the content or the path of a local file.
            message: of the commit.

        Raises:
            StoreError: after five attempts, or at once when rejected.
        """
        from huggingface_hub import CommitOperationAdd

        def call() -> None:
            added = [
                CommitOperationAdd(path_in_repo=self._path(name), path_or_fileobj=content)
                for name, content in files.items()
            ]
            self._api.create_commit(
                self.repository,
                added,
                commit_message=message,
                revision=self._revision,
                repo_type="dataset",
            )

        self._try(call)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _try(self, call: Callable[[], T]) -> T:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return retried(call, self.repository, final=(EntryNotFoundError,))
        except EntryNotFoundError:
            raise
        except Exception as error:
            raise StoreError(
                f"{self.url}: the hub does not take it ({reason_of(error)})",
                expected="a token with the right to write there, and a hub that answers",
                do="run the same command again; what has arrived is not sent twice",
            ) from None


def retried(call: Callable[[], T], name: str, *, final: tuple[type[Exception], ...] = ()) -> T:
    """Return what a call to the hub returns; failures that pass are waited for, up to five times.

    Connections that fail and answers that pass (408, 425, 429, 5xx) are tried again after 2, 4, 8
    and 16 s, or what the hub's Retry-After says.

    Args:
        call: does the same when it is called again.
        name: of the repository, for the log.
        final: errors that are an answer.

    Raises:
        Exception: the call's own, the last one or one that another attempt would not change.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except final:
            raise
        except Exception as error:
            # One of a dozen kinds of the hub's client; all mean "not there yet".
            wait = _wait_before_next(error, attempt)
            if wait is None:
                raise
            _log.warning(
                "%s: attempt %d of %d failed (%s); the next in %.0f s",
                name, attempt, _ATTEMPTS, reason_of(error), wait,
            )  # fmt: skip
            time.sleep(wait)
    raise AssertionError("the last attempt raises")


def _wait_before_next(error: Exception, attempt: int) -> float | None:
    """Return the seconds before the next attempt; None where none can help, or none is left."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if attempt == _ATTEMPTS or isinstance(error, OfflineModeIsEnabled):
        return None
    response = getattr(error, "response", None)
    if response is not None:
        status = int(response.status_code)
        if not status_passes(status):
            return None
        asked = re.fullmatch(r"\d+", str(response.headers.get("Retry-After", "")))
        if asked:
            return min(float(asked[0]), _LONGEST_WAIT_S)
    # The client's transport errors are of httpx under changing names; those of its uploader in
    # Rust are plain RuntimeErrors.
    elif not isinstance(error, ConnectionError | TimeoutError | RuntimeError) and not any(
        kind.__name__ == "TransportError" for kind in type(error).__mro__
    ):
        return None
    return min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
