"""Training: the synthetic judging world, and loops for judges and meta reward models."""
