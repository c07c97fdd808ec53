"""The entry points a person runs, one file each, and their configurations."""

import os

# Threads of OpenMP that spin while they wait take the core from the one that they wait for: beside
# other busy processes a step of two threads took 2.7 and 3.7 times as long, alone the same.
# Read when torch is loaded, so it stands before every other import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
