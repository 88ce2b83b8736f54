"""The ads cascade: a world with a known truth, and production models that are really trained on what they showed.

::

    World (latents, truth, drift, turnover)            world.py
      | requests with pools of candidate ads            requests.py
      v
    retrieval -> early -> ranking -> shown              cascade.py, production.py: trained on earlier impressions
      | impressions with sampled labels, considerations without
      v
    Arrow tables of the schema's columns                features.py, history.py, simulation.py
      v
    source ``simulator``                                source.py

UKDSL sections 3.2 and 4.1 describe the cascade that this imitates; docs/simulator.md holds its measured marginals.
"""
