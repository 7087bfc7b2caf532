"""The libraries that take long to import; every process of `processes` has them."""

import gc

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import transformers
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.pipelines
import transformers.trainer  # noqa: F401

gc.freeze()  # libraries are not garbage, which Trainer would search in every run
