"""The thin layer on Ray: training workers and pools of actors."""
