"""Heads are moved before layers share, and attention stays what it was."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

import shared_bert
from shared_bert.injection.aligning import FREE_HEADS

from .architectures import ARCHITECTURES, logits

ONE = {"depth_sharing": "sequential", "num_groups": 1, "depth_shared_matrices": "qkvo"}
LAYERS, HEADS, KEYS, HEAD_DIM = 3, 4, 2, 8
# With factors of full rank nothing is lost, although heads move towards the mean of all layers.
WHOLE = {**ONE, "rank": HEADS * HEAD_DIM}
SHAPE = {
    "hidden_size": HEADS * HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
}
DECODER = {**SHAPE, "num_key_value_heads": KEYS, "head_dim": HEAD_DIM}
IMAGES = {**SHAPE, "image_size": 16, "patch_size": 8}
SEQ2SEQ = {
    "d_model": 32, "vocab_size": 99, "pad_token_id": 0,
    "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
}  # fmt: skip
QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))
FREE = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "gemma", "gemma2", "granite", "starcoder2", "qwen3", "gemma3_text"),
        DECODER,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), SHAPE),
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
    **dict.fromkeys(("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model"), IMAGES),
    "whisper": {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "decoder_start_token_id": 1},
    "bart": SEQ2SEQ,
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def noisy(model):
    """Norms, biases and positions that start at one or zero hide what they tell apart."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def moved(model, shared, name) -> bool:
    """Whether aligning has changed the last matrix with this name."""
    last = [path for path, _ in model.named_modules() if path.split(".")[-1] == name][-1]
    before, after = (side.get_submodule(last).weight for side in (model, shared))
    return bool((before - after).norm() > 0.01 * before.norm())


@pytest.mark.parametrize("model_type", FREE)
def test_outputs_stay(model_type):
    torch.manual_seed(0)
    model = noisy(AutoModel.from_config(AutoConfig.for_model(model_type, **FREE[model_type])))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, 9), generator=generator)
    inputs = {
        "pixel_values": {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)},
        "input_features": {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids},
        "input_ids": {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()},
    }[model.main_input_name]
    shared, _ = shared_bert.share(model, **WHOLE)
    names = {path.split(".")[-1] for path, _ in model.named_modules()}
    query, value = next(pair for pair in QUERY_AND_VALUE if pair[0] in names)
    assert moved(model, shared, value)
    if model_type not in ("qwen3", "gemma3_text"):  # which norm queries and keys
        assert moved(model, shared, query)
    with torch.no_grad():
        found, expected = shared(**inputs)[0], model(**inputs)[0]
    if "attention_mask" in inputs:  # what stands at the padding attends as it may
        found, expected = found[inputs["attention_mask"].bool()], expected[inputs["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_all_free_classes_are_tested():
    with torch.device("meta"):
        models = [AutoModel.from_config(AutoConfig.for_model(name, **fields)) for name, fields in FREE.items()]
    classes = {type(module).__name__ for model in models for module in model.modules()}
    assert len(set(FREE_HEADS) - classes) <= 1  # of DINOv2's, which has another name in older releases


def test_heads_of_other_classes_stay():
    """T5's bias of positions has an entry per head."""
    model = noisy(ARCHITECTURES["t5"].model())
    reports = [shared_bert.share(model, align=align, **ONE)[1] for align in (True, False)]
    assert reports[0].errors == reports[1].errors
    assert reports[0].aligned == []


def rotation(generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=generator))[0]


def rotation_of_pairs(generator) -> torch.Tensor:
    """A rotation of each pair of channels j and j + HEAD_DIM / 2, of a random angle."""
    angles = 6.28 * torch.rand(HEAD_DIM // 2, generator=generator)
    cos, sin = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])


@torch.no_grad()
def moved_copies(model, rotation_of_logits):
    """Make all layers the first one, with its heads in another order, and turned."""
    generator = torch.Generator().manual_seed(3)
    first, *others = (layer.self_attn for layer in model.model.layers)
    for attention in others:
        order = torch.randperm(KEYS, generator=generator)
        of_logits = torch.stack([rotation_of_logits(generator) for _ in range(KEYS)])[:, None]
        of_values = torch.stack([rotation(generator) for _ in range(KEYS)])[:, None]
        for name, turn in (("q", of_logits), ("k", of_logits), ("v", of_values)):
            heads = getattr(first, f"{name}_proj").weight.unflatten(0, (KEYS, -1, HEAD_DIM))
            getattr(attention, f"{name}_proj").weight.copy_((turn.mT @ heads)[order].flatten(0, 2))
        columns = first.o_proj.weight.T.unflatten(0, (KEYS, -1, HEAD_DIM))
        attention.o_proj.weight.copy_((of_values.mT @ columns)[order].flatten(0, 2).T)


@pytest.fixture
def grouped_llama():
    return ARCHITECTURES["llama"].model(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEYS)


def test_layers_that_differ_by_what_is_free_lose_nothing(grouped_llama):
    inputs = ARCHITECTURES["llama"].inputs()
    moved_copies(grouped_llama, rotation_of_pairs)
    shared, _ = shared_bert.share(grouped_llama, **ONE)
    torch.testing.assert_close(logits(shared, inputs), logits(grouped_llama, inputs), rtol=1e-4, atol=1e-4)
    _, unaligned = shared_bert.share(grouped_llama, align=False, **ONE)
    assert min(max(errors) for errors in unaligned.errors.values()) > 0.1


def test_queries_and_keys_turn_only_with_their_positions(grouped_llama):
    """Any other rotation of both would change attention between different positions."""
    moved_copies(grouped_llama, rotation)
    errors = shared_bert.share(grouped_llama, **ONE)[1].errors
    assert max(errors["layers.*.self_attn.q_proj"]) > 0.1
    assert max(errors["layers.*.self_attn.v_proj"]) < 1e-5


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("scheme", [scheme for scheme in shared_bert.SCHEMES if scheme != "standard"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_scheme_whose_layers_share_loses_nothing_more(model_type, scheme, align):
    torch.manual_seed(0)
    fields = {**FREE[model_type], "num_key_value_heads": KEYS if scheme in ("query_free", "shared_kv") else HEADS}
    model = noisy(AutoModel.from_config(AutoConfig.for_model(model_type, **fields)))
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    expected, _ = shared_bert.share(model, attention_scheme=scheme)
    found, report = shared_bert.share(model, attention_scheme=scheme, align=align, **WHOLE)
    assert bool(report.aligned) == align
    with torch.no_grad():
        expected, found = expected(**inputs)[0], found(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
