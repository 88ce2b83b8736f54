"""A teacher larger than one worker: a replica that is a gang of members, each with its slices of the tables."""
