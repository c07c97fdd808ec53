"""What training runs on: how its processes start, DeepSpeed's configuration, averaged weights."""
