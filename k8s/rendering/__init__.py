"""Manifests of one run: Kustomize's output, the stage's configuration, sizes, names, variants."""
