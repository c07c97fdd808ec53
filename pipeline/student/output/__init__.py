"""The finished student: export, model card, publishing to the hub."""
