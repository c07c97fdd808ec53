"""What a cluster knows: Kubernetes objects, the operator's pods, instance types; and kubectl."""
