"""The layout of a cache: schema, manifest, shard records, quarantine list, dataset card."""
