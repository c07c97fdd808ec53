"""The local folder beside remote caches: files that nobody touched go, others stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.storage.local_folder import remove_old


def test_files_untouched_for_a_month_go_by_their_names(tmp_path: Path) -> None:
    long_ago = time.time() - 31 * 24 * 3600
    for name in ("old.npy", "old.partial", "old.lock", "new.npy"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("old.npy", "old.partial", "old.lock"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    remove_old(tmp_path, "*.npy", "*.partial")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new.npy", "old.lock"]
