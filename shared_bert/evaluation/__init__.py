"""Measurements: a model's cost, speed and quality."""

from .efficiency import StepSettings, TrainingStep, compare_training_steps, environment, peak_memory
from .likelihood import DocumentLosses, blimp_accuracy, document_losses, load_pairs, perplexity, sentence_scores
from .parameters import Cost, cost_table, load_config, model_cost
from .sentence_similarity import sentence_embeddings, similarity_spearman

__all__ = [
    "Cost",
    "DocumentLosses",
    "StepSettings",
    "TrainingStep",
    "blimp_accuracy",
    "compare_training_steps",
    "cost_table",
    "document_losses",
    "environment",
    "load_config",
    "load_pairs",
    "model_cost",
    "peak_memory",
    "perplexity",
    "sentence_embeddings",
    "sentence_scores",
    "similarity_spearman",
]
