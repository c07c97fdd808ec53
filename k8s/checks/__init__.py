"""Rules that a rendered manifest must pass: schemas, the operator's, Pod Security, references."""
