"""The worker loop over periods: sharding, optimisers, checkpoints."""
