"""Clusters: what is run on their hosts to set them up, and what a user's own machine asks of them."""
