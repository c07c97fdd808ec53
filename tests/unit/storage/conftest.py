"""One store of each kind: a folder, fsspec's memory, and a real S3 server on this machine."""

from __future__ import annotations

import functools
import logging
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Store


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Start moto's S3 server on a free port and point AWS clients at it."""
    from moto.server import ThreadedMotoServer

    _one_put_at_a_time()
    # A test before this one may have let all libraries log.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


def _one_put_at_a_time() -> None:
    """Make a conditional put of moto what it is on S3: atomic; moto looks first and writes then."""
    from moto.s3.responses import S3Response

    real, lock = S3Response.put_object, threading.Lock()
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def put_object(self: Any, *args: Any, **options: Any) -> Any:
        with lock:
            return real(self, *args, **options)

    S3Response.put_object = put_object


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    """Return the name of a new bucket."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return name


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store of each kind in turn."""
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://root-{uuid.uuid4().hex}/cache")
    return Store(f"s3://{request.getfixturevalue('bucket')}/some/cache")
