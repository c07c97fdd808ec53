"""The report as frozen records, without any opinion on how they look; to JSON and back."""
