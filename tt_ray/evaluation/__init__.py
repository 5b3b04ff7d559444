"""Environments, closed-loop episodes, scores and data collection."""
