"""A run before it runs: what a launch line costs, and whether it would work."""
