"""The parts of the plan of memory: what a run takes, what fits, and what this machine has."""
