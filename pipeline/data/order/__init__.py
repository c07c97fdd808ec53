"""Which rows make which step, by arithmetic: permutations, packs, lanes, windows, the plan."""
