"""Beam search over the model, and the engine that plans for many episodes at once."""
