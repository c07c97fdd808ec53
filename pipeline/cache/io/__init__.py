"""Writing and reading shards: the writer, the reader, copies of remote shards on a local disk."""
