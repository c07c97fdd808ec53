"""Files on any fsspec file system: local disk, FSx, NFS, s3://, memory://."""

from pipeline.storage.store import Store

__all__ = ["Store"]
