"""Measurements: what the engine does, how well and how fast, each ending in one JSON line."""
