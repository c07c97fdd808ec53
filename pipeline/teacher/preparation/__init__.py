"""Units of a source -> tokenised samples in the prepared corpus, by all workers of a fleet."""
