"""Long packs: processes that share a forward pass by slices, tiles of MLPs, offloaded inputs."""
