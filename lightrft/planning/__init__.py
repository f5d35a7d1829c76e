"""What a run will need, worked out before there is a machine for it."""
