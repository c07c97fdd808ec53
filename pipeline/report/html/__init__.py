"""The self-contained page and its templates."""
