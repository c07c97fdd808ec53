"""Jobs on a cluster: apply, wait for the end, follow the logs, list."""
