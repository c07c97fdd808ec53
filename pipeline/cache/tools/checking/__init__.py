"""What `verify` and `repair` stand on: files against records, plans against both, repeats."""
