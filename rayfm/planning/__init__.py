"""What a training step would take on a cluster that one does not have: memory, a sharding plan, expected times.

Everything here is arithmetic over counted work and published hardware figures; docs/planning.md states the model.
"""
