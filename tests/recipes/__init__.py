"""The recipes checked against the published configurations of their models; their cost table."""
