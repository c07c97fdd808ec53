"""Shared with the storage tests: the S3 server."""

from tests.unit.storage.conftest import bucket, s3_endpoint

__all__ = ["bucket", "s3_endpoint"]
