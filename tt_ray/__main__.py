"""`python -m tt_ray`."""

from tt_ray.cli import main

main()
