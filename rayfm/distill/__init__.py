"""Objectives, the terms of a student's loss, with their heads, adapters and scalings."""

from rayfm.distill.base import OBJECTIVES, Objective, ObjectiveConfig, Term

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "Term"]
