"""Stage two: cache and student in, trained student out."""
