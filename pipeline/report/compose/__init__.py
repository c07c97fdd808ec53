"""Finished runs and their cache to a report: folders, what they left, the report's records."""
