"""Measurements: a model's cost, speed and quality."""

from .efficiency import StepSettings, TrainingStep, compare_decoding, compare_training_steps, environment, peak_memory
from .parameters import Cost, cost_table, load_config, model_cost
from .sentence_similarity import sentence_embeddings, similarity_spearman

__all__ = [
    "Cost",
    "StepSettings",
    "TrainingStep",
    "compare_decoding",
    "compare_training_steps",
    "cost_table",
    "environment",
    "load_config",
    "model_cost",
    "peak_memory",
    "sentence_embeddings",
    "similarity_spearman",
]
