"""The loop over periods that ties the rooms together, and its config."""
