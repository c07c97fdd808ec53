"""The tokenised corpus as files: units of the source, each prepared once, by whoever takes it."""
