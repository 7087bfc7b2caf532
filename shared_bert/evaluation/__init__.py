"""Measurements: what a model costs, and what it is worth."""

from .efficiency import StepSettings, TrainingStep, compare_training_steps, environment, peak_memory

__all__ = ["StepSettings", "TrainingStep", "compare_training_steps", "environment", "peak_memory"]
