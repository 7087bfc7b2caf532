"""Models in which every parameter matters, their folders, and a padded batch."""

import pytest
import torch

import shared_bert

from ..conftest import tiny_model

TEXTS = ["the fox hunts .", "the dog barks . the owl sees ."]


def random_model(kind: str, cls=None, **fields):
    """A tiny model none of whose parameters is zero, one or an identity."""
    model = tiny_model(kind, cls, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def padded_batch(input_ids) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(input_ids)
    mask[1, 8:] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture
def save(tokenizers, tmp_path):
    """Saves a model of a class with its tokenizer; gives the model, the tokenizer and the folder."""

    def save(cls, **fields):
        kind = "bert" if cls.config_class is shared_bert.SharedBertConfig else "gpt"
        tokenizer = tokenizers[kind]
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        model = random_model(kind, cls, vocab_size=len(tokenizer), **special, **fields)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model, tokenizer, str(tmp_path)

    return save
