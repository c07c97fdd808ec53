"""The entry points a person runs, one file each, and their configurations."""

import os

# Threads of OpenMP that spin while they wait take the core from the one that they wait for: beside
# another busy process a training step of two threads took 4 to 7 times as long, alone the same.
# Read when torch is loaded, so it stands before every other import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
