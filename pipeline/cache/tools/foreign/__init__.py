"""Other projects' files of teacher log-probs, imported as top-k caches of temperature 1."""
