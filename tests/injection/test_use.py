"""A stock model that shares is used like any other."""

import copy

import accelerate
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
)

import shared_bert
from shared_bert.training.trainer import SafeTrainer

from .architectures import ARCHITECTURES

peft = pytest.importorskip("peft", reason="needs the package peft")
# PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_generation_with_every_cache(shared, inputs):
    prompt = inputs["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for search in ({}, {"num_beams": 3}):
        expected = shared.generate(prompt, use_cache=False, **options, **search)
        for cache in ("dynamic", "static"):
            assert torch.equal(shared.generate(prompt, cache_implementation=cache, **options, **search), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["masa", "shared, sequential"], indirect=True)
def test_compiled_without_a_graph_break(shared, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(shared, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, shared(**inputs).logits)
    expected = gradients(shared, inputs)
    for name, found in gradients(compiled, inputs).items():
        torch.testing.assert_close(found, expected[name.removeprefix("_orig_mod.")])


def test_activation_checkpointing(shared, inputs):
    shared.train()
    expected = gradients(shared, inputs)
    # Releases of transformers before 5.23 have the older name only.
    getattr(shared, "activation_checkpointing_enable", shared.gradient_checkpointing_enable)()
    torch.testing.assert_close(gradients(shared, inputs), expected)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_bfloat16(shared, inputs, is_autocast):
    expected = shared(**inputs).logits
    model = shared if is_autocast else copy.deepcopy(shared).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        outputs = model(**inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits.float(), expected, rtol=0.05, atol=0.02)


def test_a_copy_shares_by_itself(shared, inputs):
    expected = shared(**inputs).logits
    other = copy.deepcopy(shared)
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.zero_()
    assert torch.equal(other(**inputs).logits, expected)


def test_offloaded(shared, inputs, tmp_path):
    expected = shared(**inputs).logits
    assert torch.equal(
        accelerate.cpu_offload(copy.deepcopy(shared), execution_device="cpu")(**inputs).logits, expected
    )
    shared.save_pretrained(tmp_path)
    offload = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **offload)
    assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiplied_out_after_it_was_saved_and_cast(shared, inputs, tmp_path, dtype):
    shared.save_pretrained(tmp_path)
    expected = shared(**inputs).logits
    plain = shared.to(dtype).dequantize()
    assert plain.dtype == dtype
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(**inputs).logits.float(), expected, rtol=0.05, atol=0.02)


def test_with_and_without_the_head(shared, inputs, tmp_path):
    base = shared.base_model
    expected = base(inputs["input_ids"]).last_hidden_state
    shared.save_pretrained(tmp_path / "model")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "model")(inputs["input_ids"]).last_hidden_state, expected)


def test_a_part_of_a_model_loads_alone(tmp_path):
    architecture = ARCHITECTURES["t5"]
    model, _ = shared_bert.share(architecture.model(), depth_sharing="masa", num_atoms=2)
    model.save_pretrained(tmp_path)
    input_ids = architecture.inputs()["input_ids"]
    expected = model.encoder(input_ids).last_hidden_state
    assert torch.equal(T5EncoderModel.from_pretrained(tmp_path)(input_ids).last_hidden_state, expected)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters(shared, inputs, targets, tmp_path):
    expected = shared(**inputs).logits
    model = peft.get_peft_model(shared, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    found = gradients(model, inputs)
    assert found
    assert all("lora" in name for name in found)
    assert not torch.allclose(model(**inputs).logits, expected)
    with pytest.raises(TypeError, match=r"made from others and cannot be replaced: call dequantize\(\)"):
        model.merge_and_unload()


def test_adapters_merge_after_multiplying_out(shared, inputs):
    plain = shared.dequantize()
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    expected = model(**inputs).logits
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_trainer_takes_it(shared, inputs, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]] * 4
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(shared, args, train_dataset=rows)
    before = {name: parameter.detach().clone() for name, parameter in shared.named_parameters()}
    trainer.train()
    assert [name for name, parameter in shared.named_parameters() if torch.equal(parameter, before[name])] == []
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, shared.eval()(**inputs).logits)


def test_matrices_decay_and_coefficients_and_diagonals_do_not(shared, tmp_path):
    trainer = SafeTrainer(shared, TrainingArguments(str(tmp_path), use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(shared))
    for name, parameter in shared.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith("coefficients")
        assert (name in decayed) == is_matrix, name


def test_a_product_of_several_roles_is_computed_once(llama, inputs):
    model, _ = shared_bert.share(llama, "shared", initialize=True)
    calls = []
    model.model.layers[0].self_attn.q_proj.map.register_forward_hook(lambda *args: calls.append(1))
    model(**inputs)
    assert len(calls) == 1
    assert all(getattr(module, "kept", None) is None for module in model.modules())  # nothing is held


def literal_roles(scheme, attention, states):
    """Query, key and value as the papers define them, from the parameters by name."""
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj

    def product(role):
        return states @ role.map.weight.double().T

    if scheme == "symmetric":
        return product(q), product(q), product(v)
    if scheme == "pairwise":
        query = product(q)
        heads = query.unflatten(-1, (4, 8))
        pairwise = q.ingredient.pairwise.double()
        return query, torch.einsum("bshi,hij->bshj", heads, pairwise).flatten(-2), product(v)
    if scheme == "shared":
        shared = product(q)
        return tuple(shared * getattr(q.ingredient, f"{role}_diagonal").double() for role in ("query", "key", "value"))
    if scheme == "unified":
        return (product(q),) * 3
    if scheme == "query_free":
        return states / 2, product(k), product(v)
    if scheme == "key_free":
        return product(q), states, product(v)
    if scheme == "value_free":
        return product(q), product(k), states
    return product(q), product(k), product(k)


@pytest.mark.parametrize("scheme", [scheme for scheme in shared_bert.SCHEMES if scheme != "standard"])
def test_roles_are_the_papers(llama, scheme):
    model, _ = shared_bert.share(llama, scheme, initialize=True, diagonal_init_std=0.5)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        attention = layer.self_attn
        expected = literal_roles(scheme, attention, states.double())
        for projection, role in zip((attention.q_proj, attention.k_proj, attention.v_proj), expected, strict=True):
            torch.testing.assert_close(projection(states).double(), role, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(states.double() @ projection.weight.double().T, role, rtol=1e-4, atol=1e-5)


def test_matrices_are_sums_of_atoms(llama):
    model, _ = shared_bert.share(llama, depth_sharing="masa", num_atoms=3)
    matrix = model.model.shared_matrices["q0"]
    for layer, coefficients in zip(model.model.layers, matrix.coefficients, strict=True):
        expected = sum(c * atom for c, atom in zip(coefficients, matrix.atoms, strict=True))
        torch.testing.assert_close(layer.self_attn.q_proj.weight.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize(
    ("depth_sharing", "size", "groups"),
    [("sequential", {"num_groups": 2}, [0, 0, 1, 1]), ("repeat_all_over", {"num_groups": 2}, [0, 1, 0, 1])],
)
def test_groups_of_layers_take_their_mean(llama, depth_sharing, size, groups):
    model, _ = shared_bert.share(llama, depth_sharing=depth_sharing, targets=["up_proj"], **size)
    old = torch.stack([layer.mlp.up_proj.weight for layer in llama.model.layers])
    for layer, group in zip(model.model.layers, groups, strict=True):
        expected = old[[i for i, other in enumerate(groups) if other == group]].mean(0)
        torch.testing.assert_close(layer.mlp.up_proj.weight.as_subclass(torch.Tensor), expected)


def test_new_matrices_have_the_architecture_s_deviation(llama):
    for options in (
        {"depth_sharing": "masa", "num_atoms": 2, "targets": ["gate_proj"]},
        {"depth_sharing": "sequential", "num_groups": 2, "targets": ["gate_proj"]},
        {"depth_sharing": "low_rank", "rank": 16, "targets": ["gate_proj"]},
    ):
        torch.manual_seed(0)
        model, report = shared_bert.share(llama, initialize=True, **options)
        assert report.errors == {}
        for old, new in zip(llama.model.layers, model.model.layers, strict=True):
            assert float(new.mlp.gate_proj.weight.std()) == pytest.approx(
                float(old.mlp.gate_proj.weight.std()), rel=0.15
            )


def test_modules_are_those_of_the_stock_model_but_for_the_shared(llama):
    model, _ = shared_bert.share(llama, depth_sharing="masa", num_atoms=2)
    for name, module in llama.named_modules():
        other = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            assert isinstance(other, nn.Linear)
        else:
            assert type(other) is type(module)


@pytest.mark.slow
def test_a_detector_learns_boxes(tmp_path):
    """As in the detection runs of MASA's paper (arXiv 2508.04581), but of tiny shape: a square in each image."""
    pytest.importorskip("scipy", reason="the loss of YOLOS needs scipy")
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = YolosConfig(**shape, image_size=[16, 16], patch_size=4, num_detection_tokens=3, num_labels=1)
    options = {"depth_sharing": "masa", "num_atoms": 2, "depth_shared_matrices": "qkvo", "initialize": True}
    torch.manual_seed(0)
    model, _ = shared_bert.share(YolosForObjectDetection(config), **options)
    images, labels = torch.zeros(8, 3, 16, 16), []
    places = torch.randint(0, 9, (8, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for image, place in zip(images, places, strict=True):
        image[:, place[1] : place[1] + 8, place[0] : place[0] + 8] = 1.0
        box = [[(place[0] + 4) / 16, (place[1] + 4) / 16, 0.5, 0.5]]
        labels.append({"class_labels": torch.tensor([0]), "boxes": torch.tensor(box)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = YolosForObjectDetection.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).pred_boxes, model(images).pred_boxes)
    torch.testing.assert_close(loaded.dequantize()(images).pred_boxes, model(images).pred_boxes, rtol=1e-4, atol=1e-5)
