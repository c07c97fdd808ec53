"""Students on the hub: uploads that are retried, and those of checkpoints beside the training."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DistillError, StoreError
from pipeline.program import target_name
from pipeline.storage.hub import reason_of, retried

__all__ = ["CheckpointUploads", "push_to_hub", "require_hub_token"]

_log = logging.getLogger(__name__)


def require_hub_token() -> None:
    """Reject a run that is to push but has no token, before it has trained for hours.

    Raises:
        ConfigError: no token in the environment or in the hub's own login file.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(
            "save_location asks for a push to the hub, but there is no token",
            expected="HF_TOKEN with the right to write, or a login by `hf auth login`",
            do="set it, or train with --save_location local and push later with "
            f"`{target_name('push-student')}`",
        )


def push_to_hub(folder: Path, repository: str, *, message: str = "Upload the student") -> str:
    """Upload a student folder as one commit and return its address.

    Failures that pass are retried, see `retried`; a rejection (no such right, no such name) is not.

    Raises:
        StoreError: after five attempts, or at once when rejected; the folder stays as it is, and
            the push can be repeated.
    """
    from huggingface_hub import HfApi

    api = HfApi()

    def push() -> None:
        api.create_repo(repository, exist_ok=True)
        # What an earlier commit left there and this one lacks would be loaded with it.
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message=message,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )

    try:
        retried(push, repository)
    except Exception as error:
        raise _failed(error, folder, repository) from None
    return f"{api.endpoint}/{repository}"


class CheckpointUploads:
    """Pushes the weights of checkpoints in a thread, so that training does not wait for the net.

    A checkpoint that comes while the one before is under way is not pushed: the newer the better,
    and the finished student comes at the end. A push that fails is logged; the checkpoint itself is
    on disk, and training goes on.
    """

    def __init__(
        self,
        repository: str,
        folder: Path,
        *,
        gather: Callable[[], dict[str, Any] | None],
        any_rank: Callable[[bool], bool],
        export: Callable[[dict[str, Any], Path, int], None],
    ) -> None:
        """Keep the parts; `folder` holds the student that is under way.

        Args:
            repository: on the hub.
            folder: made and deleted here, by rank 0.
            gather: returns the weights on rank 0 and None elsewhere; all ranks call it together.
            any_rank: returns on every rank whether one of them said True.
            export: writes weights as a model folder, for the step given.
        """
        self._repository = repository
        self._folder = folder
        self._gather = gather
        self._any_rank = any_rank
        self._export = export
        self._thread: threading.Thread | None = None

    def push(self, step: int) -> None:
        """Begin to push the weights as they are now; every rank calls it after the same step."""
        if self._any_rank(self._thread is not None and self._thread.is_alive()):
            _log.info("step %d is not pushed: an earlier checkpoint is still under way", step)
            return
        state = self._gather()
        if state is None:
            return
        try:
            self._export(state, self._folder, step)
        except DistillError as error:
            _log.warning("step %d is not pushed: %s", step, error)
            return
        # A daemon: whoever ends the run need not wait for a slow net.
        self._thread = threading.Thread(target=self._upload, args=(step,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the push that is under way, so that the finished student comes after it."""
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _upload(self, step: int) -> None:
        try:
            address = push_to_hub(self._folder, self._repository, message=f"Step {step}")
        except StoreError as error:
            _log.warning("step %d is not pushed, training goes on: %s", step, error.found)
        else:
            _log.info("step %d pushed to %s", step, address)


def _failed(error: Exception, folder: Path, repository: str) -> StoreError:
    again = target_name("push-student", f"--output_dir {folder.parent} --hub_location {repository}")
    return StoreError(
        f"{repository}: the student cannot be pushed ({reason_of(error)})",
        expected="HF_TOKEN with the right to write there",
        do=f"the student is safe in {folder}; repeat with `{again}`",
    )
