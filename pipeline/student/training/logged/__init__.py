"""What is logged of a step: its losses, its speed, and a profile of a few steps."""
