"""Which rows make which step, by arithmetic: permutations, packs, the plan."""
