"""Near-line labelling: rows that are posted are accepted durably, scored in batches and committed exactly once.

See docs/nearline.md for what an accepted row is promised.
"""
