"""What `python -m k8s` can do: options of each command, and the functions behind them."""
