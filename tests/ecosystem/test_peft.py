"""LoRA by PEFT: which modules it adapts, and that adapted models train, merge, save and convert."""

import pytest
import torch

import shared_bert

from ..conftest import ATTENTION
from .conftest import random_model

peft = pytest.importorskip("peft", reason="needs the package peft")

# PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Where layers have their own matrices, the two of attention; "output" alone would name BERT's norms as well.
ATTENTION_MATRICES = r".*\.(self|attn)\.(projection|output)"
# The feed-forward's, which depth sharing leaves alone.
FEED_FORWARD = r".*(intermediate\.dense|layer\.\d+\.output\.dense|mlp\.c_fc|mlp\.c_proj)"
SHARED = [name for name, fields in ATTENTION.items() if "depth_sharing" in fields]


def targets(attention: dict) -> str:
    return FEED_FORWARD if "depth_sharing" in attention else ATTENTION_MATRICES


def adapt(model, attention, **options):
    # B starts at zero, so that a fresh adapter changes nothing; here it should.
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets(attention), init_lora_weights=False, **options)
    ).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_adapters_alone_train(kind, attention, input_ids):
    model = adapt(random_model(kind, **attention), attention).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_merged_saved_and_converted_models_give_the_same(kind, attention, padded_batch, tmp_path):
    base = random_model(kind, **attention)
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, attention)
    expected = logits(model, padded_batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, padded_batch), expected)

    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert (expected - logits(type(base).from_pretrained(tmp_path / "base"), padded_batch)).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged, padded_batch), expected, rtol=1e-4, atol=1e-4)
    stock = shared_bert.to_stock(merged)
    is_text = padded_batch["attention_mask"] == 1
    torch.testing.assert_close(logits(stock, padded_batch)[is_text], expected[is_text], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_matrices_that_are_no_linear_layers_are_refused(kind, name):
    with pytest.raises(ValueError, match=r"(?s)Target module (SharedLinear|LowRankLinear).*is not supported"):
        peft.get_peft_model(random_model(kind, **ATTENTION[name]), peft.LoraConfig(target_modules=["projection"]))


def test_output_alone_names_the_norm_of_bert():
    with pytest.raises(ValueError, match="Target module SharedBertAttentionNorm"):
        peft.get_peft_model(random_model("bert"), peft.LoraConfig(target_modules=["output"]))


def test_a_new_head_is_trained_and_saved_in_full(padded_batch, tmp_path):
    cls, attention = shared_bert.SharedBertForSequenceClassification, ATTENTION["shared"]
    base = random_model("bert", cls, **attention)
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, attention, modules_to_save=["classifier"])
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save.default.weight += 1
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, padded_batch), logits(model, padded_batch))


@pytest.mark.parametrize("way", ["target_modules", "modules_to_save"])
def test_the_loss_sees_what_is_done_to_the_vocabulary_head(kind, way, input_ids):
    """In training the logits are not given, and the loss is made without a call of the plain head."""
    head = {"bert": "decoder", "gpt": "lm_head"}[kind]
    options = (
        {"target_modules": ["projection", head]}
        if way == "target_modules"
        else {"target_modules": ["projection"], "modules_to_save": [head]}
    )
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    model = peft.get_peft_model(random_model(kind), config).train()
    loss = model(input_ids=input_ids, labels=input_ids).loss
    logits, labels = model(input_ids=input_ids).logits, input_ids
    if kind == "gpt":
        logits, labels = logits[:, :-1], labels[:, 1:]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["standard", "shared", "masa"])
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_and_prefixes_get_gradients_and_generate(name, method, input_ids):
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(random_model("gpt", **ATTENTION[name]), config)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    model(**batch, labels=input_ids).loss.backward()
    (trained,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert trained.grad.all()
    written = model.eval().generate(**batch, max_new_tokens=1, do_sample=False)
    assert torch.equal(written[:, -1], logits(model, batch)[:, -1].argmax(-1))


def test_embeddings_stay_tied(kind):
    merged = adapt(random_model(kind), ATTENTION["shared"]).merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
