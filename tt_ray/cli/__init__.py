"""The `tt-ray` command."""

from tt_ray.cli.app import main

__all__ = ["main"]
