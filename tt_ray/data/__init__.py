"""Trajectories: reading, discretising, tokens and training windows."""
