"""Trajectory Transformer experiments on Ray: offline planning as sequence modelling, from data to a score."""

__version__ = "0.1.0"
