"""The plug-in by which vLLM serves the models of this package, through its backend for transformers models.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Importing this package makes
the configs known to `AutoConfig`, so that no code of a checkpoint is run.
"""

BACKEND = "vllm.model_executor.models.transformers"
MODELS = {
    "SharedGptForCausalLM": f"{BACKEND}:TransformersForCausalLM",
    "SharedBertModel": f"{BACKEND}:TransformersEmbeddingModel",
    "SharedBertForSequenceClassification": "shared_bert.serving.vllm_models:SharedBertForSequenceClassification",
    "SharedGptForSequenceClassification": "shared_bert.serving.vllm_models:SharedGptForSequenceClassification",
}


def register():
    """Tell vLLM which of its classes runs which architecture."""
    from vllm import ModelRegistry

    for architecture, model_class in MODELS.items():
        ModelRegistry.register_model(architecture, model_class)
