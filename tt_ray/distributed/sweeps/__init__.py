"""Sweeps: from a study on disk to trials under Ray Tune, a table, and an honest winner."""
