"""Speed of planning and training on this machine, against what the machine can do at most."""
