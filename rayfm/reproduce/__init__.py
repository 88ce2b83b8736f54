"""The papers' tables, each reproduced by one command: what to train, what to compare, what held."""
