"""The report's sentences and its terminal table."""
