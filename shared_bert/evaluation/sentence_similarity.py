"""Spearman correlation of a model's sentence embeddings with human similarity scores, as in STS-B."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.calibration import evaluating


@torch.no_grad()
def sentence_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """Return sentence embeddings [sentences, hidden]: the mean of a model's last hidden states, scaled to length one.

    Args:
        model: a base model (`SharedBertModel`, `BertModel` …), stock or of this package.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # similar lengths need little padding
    embeddings = torch.empty(len(sentences), model.config.hidden_size)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer([sentences[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            states = model(**batch.to(model.device)).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            embeddings[rows] = ((states * mask).sum(1) / mask.sum(1)).cpu()
    return torch.nn.functional.normalize(embeddings, dim=-1)


def similarity_spearman(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[tuple[str, str]],
    scores: Sequence[float],
) -> float:
    """Return Spearman's rank correlation of the cosines of the pairs' embeddings with their scores."""
    try:
        from scipy.stats import spearmanr
    except ModuleNotFoundError as error:
        raise ImportError("Spearman's correlation needs scipy: pip install 'shared_bert[convert]'") from error
    left, right = (sentence_embeddings(model, tokenizer, side) for side in zip(*pairs, strict=True))
    return float(spearmanr((left * right).sum(-1).numpy(), scores).statistic)
