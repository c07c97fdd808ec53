"""Stage one: corpus and teacher in, cache out."""
