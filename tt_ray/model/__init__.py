"""The Trajectory Transformer, its loss, its key/value cache and its checkpoint folder."""
