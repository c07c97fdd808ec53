"""What lies where in a cache: schema, manifest, shard records, quarantine list, dataset card."""
