"""Many workers on one cache: leases, in-flight markers, rows that fail, signals."""
