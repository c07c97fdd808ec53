"""Other projects' targets and losses, run from a checkout of theirs that is given by path."""
