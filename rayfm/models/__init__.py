"""Backbones and heads on TorchRec collections: one module a model."""

from rayfm.models.base import MODELS, Model, ModelConfig, ModelOutput, Precision
from rayfm.models.build import build_model

__all__ = ["MODELS", "Model", "ModelConfig", "ModelOutput", "Precision", "build_model"]
