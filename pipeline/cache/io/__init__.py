"""Shards written and read: the writer, the reader, copies of remote shards on a local disk."""
