"""Rewards for other people's trainers, by a `Judge` in their process or one that is served."""
