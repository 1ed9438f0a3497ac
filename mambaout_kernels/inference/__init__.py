"""Inference on a frozen copy of a model: `optimize_for_inference`."""

from .files import load_inference_model
from .model import InferenceModel
from .optimize import optimize_for_inference

__all__ = ["InferenceModel", "load_inference_model", "optimize_for_inference"]
