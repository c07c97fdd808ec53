"""The entry points a person runs, one file each, and their configurations."""
