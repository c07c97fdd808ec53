"""Manifests of the two stages: rendered with Kustomize and Python, checked, submitted."""
