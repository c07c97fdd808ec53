"""The cluster's terms: Kubernetes objects, the operator's pods, instance types; and kubectl."""
