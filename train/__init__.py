"""Training: the synthetic judging world and supervised training on its trajectories."""
