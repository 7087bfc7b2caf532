"""Matrices shared over the depth: the literal formulas, what is kept, how they start, and how they train and save."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache, StaticCache

from shared_bert import SCHEMES, SharedGptConfig, SharedGptModel, fix_coefficients
from shared_bert.modeling import depth_sharing
from shared_bert.modeling.depth_sharing import DepthSharing, SharedMatrix
from tests.conftest import LANGUAGE_MODELS, tiny_config, tiny_model

from .test_generation import generate

LAYERS = 4
SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": 16, "intermediate_size": 24}
WAYS = {
    "masa": {"depth_sharing": "masa", "num_atoms": 3},
    "masa_network": {"depth_sharing": "masa", "num_atoms": 3, "coefficient_source": "network"},
    "sequential": {"depth_sharing": "sequential", "num_groups": 2},
    "repeat_all_over": {"depth_sharing": "repeat_all_over", "num_groups": 2},
    "low_rank": {"depth_sharing": "low_rank", "rank": 5},
}
ASSEMBLED = [way for way in WAYS if way != "low_rank"]
GROUPS = {"sequential": [0, 0, 1, 1], "repeat_all_over": [0, 1, 0, 1]}
LAYER = {"bert": "bert.encoder.layer.{}.attention.self", "gpt": "transformer.h.{}.attn"}
SHARED = {"bert": "bert.encoder.depth_sharing", "gpt": "transformer.depth_sharing"}
MAPS = {"qkv": ["projection"], "qkvo": ["projection", "output"]}


@pytest.fixture(params=list(WAYS))
def way(request) -> dict:
    return WAYS[request.param]


@pytest.fixture(params=list(MAPS))
def matrices(request) -> str:
    return request.param


def make(kind, cls=None, **fields):
    """A tiny model none of whose parameters is zero or one, so that every one matters."""
    model = tiny_model(kind, cls, **SHAPE | fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def shared_modules(model, cls):
    return [module for module in model.modules() if isinstance(module, cls)]


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def checkpoint_activations(model, use_reentrant: bool):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


# The literal form


def literal_coefficients(parameters: dict, name: str) -> torch.Tensor:
    if name in parameters:
        return parameters[name]
    features = parameters[f"{name}.embedding.weight"]
    for layer in ("hidden.0", "hidden.1"):
        features = nn.functional.gelu(
            features @ parameters[f"{name}.{layer}.weight"].T + parameters[f"{name}.{layer}.bias"]
        )
    return features @ parameters[f"{name}.out.weight"].T + parameters[f"{name}.out.bias"]


def literal_matrix(parameters: dict, config, prefix: str, name: str, layer: int) -> torch.Tensor:
    """Matrix `name` of a layer as the papers write it."""
    atoms = parameters[f"{prefix}.{name}.atoms"]
    if config.depth_sharing != "masa":
        return atoms[GROUPS[config.depth_sharing][layer]]
    coefficients = literal_coefficients(parameters, f"{prefix}.{name}.coefficients")
    return sum(coefficients[layer, s] * atoms[s] for s in range(config.num_atoms))


def unshared_parameters(kind: str, config, parameters: dict) -> dict:
    """The parameters of the model without depth sharing, in which every layer has its matrices written out."""
    is_own = [
        name for name in parameters if not any(part in name for part in ("depth_sharing", "residual", "down", ".up."))
    ]
    unshared = {name: parameters[name] for name in is_own}
    for layer in range(LAYERS):
        for linear in MAPS[config.depth_shared_matrices]:
            module = f"{LAYER[kind].format(layer)}.{linear}"
            rows = 0
            written_out = []
            for index, name in enumerate(["o"] if linear == "output" else config.scheme.matrices):
                matrix = 0
                if config.depth_sharing != "low_rank":
                    matrix = literal_matrix(parameters, config, SHARED[kind], name, layer)
                factors = f"{module}.residual" if f"{module}.residual.down" in parameters else module
                if f"{factors}.up.{index}" in parameters:
                    up = parameters[f"{factors}.up.{index}"]
                    down = parameters[f"{factors}.down"][rows : rows + up.shape[1]]
                    rows += up.shape[1]
                    matrix = matrix + up @ down
                written_out.append(matrix)
            unshared[f"{module}.weight"] = torch.cat(written_out)
    return unshared


def residual_ranks(scheme: str, matrices: str) -> list[list[int]]:
    """Ranks of every matrix of every layer, all different from their neighbours, some of them 0."""
    number = len(SCHEMES[scheme].matrices) + (matrices == "qkvo")
    return [[(layer + 2 * matrix) % 4 for matrix in range(number)] for layer in range(LAYERS)]


@pytest.mark.parametrize("residual", [None, "rank", "layer_ranks"])
def test_logits_and_gradients_are_the_formulas(kind, scheme, way, matrices, residual, input_ids):
    fields = {"attention_scheme": scheme, "num_key_value_heads": 2 if SCHEMES[scheme].can_group else None}
    sharing = way | {"depth_shared_matrices": matrices}
    if residual == "rank":
        sharing["rank"] = 3
    elif residual == "layer_ranks":
        sharing |= {"rank": None, "layer_ranks": residual_ranks(scheme, matrices)}
    model = make(kind, **fields, **sharing).double()
    unshared = tiny_model(kind, **SHAPE | fields).double()

    loss, got = gradients(model, input_ids=input_ids, labels=input_ids)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    written_out = unshared_parameters(kind, model.config, parameters)
    assert written_out.keys() == dict(unshared.named_parameters()).keys()
    expected = torch.func.functional_call(unshared, written_out, kwargs={"input_ids": input_ids, "labels": input_ids})
    torch.testing.assert_close(model(input_ids).logits, expected.logits)
    torch.testing.assert_close(loss, expected.loss)
    expected.loss.backward()
    assert got.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(got[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


# Which configs there are


@st.composite
def meaningful_fields(draw) -> dict:
    """Fields of a model that there is, in every combination."""
    scheme = draw(st.sampled_from(list(SCHEMES)))
    fields = {
        "attention_scheme": scheme,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])) if SCHEMES[scheme].can_group else None,
        "attention_bias": draw(st.booleans()),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "depth_sharing": draw(st.sampled_from(["none", "masa", "sequential", "repeat_all_over", "low_rank"])),
        "depth_shared_matrices": draw(st.sampled_from(["qkv", "qkvo"])),
        "coefficient_init": draw(st.sampled_from(["depth", "normal"])),
    }
    sharing, layers = fields["depth_sharing"], fields["num_hidden_layers"]
    number = len(SCHEMES[scheme].matrices) + (fields["depth_shared_matrices"] == "qkvo")
    row = st.lists(st.integers(0, 16), min_size=number, max_size=number)
    rank = {"rank": st.integers(1, 16)}
    layer_ranks = {"layer_ranks": st.lists(row, min_size=layers, max_size=layers)}
    if sharing == "masa":
        fields["num_atoms"] = draw(st.integers(1, layers))
        fields["coefficient_source"] = draw(st.sampled_from(["direct", "network"]))
    elif sharing in GROUPS:
        fields["num_groups"] = draw(st.integers(1, layers))
    if sharing != "none":
        ranks = [rank, layer_ranks] if sharing == "low_rank" else [{}, rank, layer_ranks]
        fields |= draw(st.fixed_dictionaries(draw(st.sampled_from(ranks))))
    return fields


INPUT_IDS = torch.arange(3, 15).view(2, 6)


@settings(max_examples=60, deadline=None)
@given(fields=meaningful_fields(), kind=st.sampled_from(["bert", "gpt"]))
def test_every_meaningful_config_is_a_model_that_trains(fields, kind):
    model = tiny_model(kind, **SHAPE | fields).train()
    loss, grads = gradients(model, input_ids=INPUT_IDS, labels=INPUT_IDS)
    assert loss.isfinite()
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() for grad in grads.values())


@settings(max_examples=200, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {"depth_sharing": st.sampled_from(["none", "masa", "sequential", "repeat_all_over", "low_rank", "MASA"])},
        optional={
            "attention_scheme": st.sampled_from(["standard", "shared", "pairwise"]),
            "num_key_value_heads": st.sampled_from([2, 4]),
            "depth_shared_matrices": st.sampled_from(["qkv", "qkvo", "qk"]),
            "num_atoms": st.integers(-1, 6),
            "num_groups": st.integers(-1, 6),
            "rank": st.integers(-1, 17),
            "layer_ranks": st.lists(st.lists(st.integers(-1, 17), min_size=3, max_size=4), min_size=3, max_size=4),
            "coefficient_source": st.sampled_from(["direct", "network", "mlp"]),
            "coefficient_init": st.sampled_from(["depth", "normal", "zero"]),
        },
    ),
    kind=st.sampled_from(["bert", "gpt"]),
)
def test_every_other_config_names_its_field(fields, kind):
    try:
        config = tiny_config(kind, **SHAPE | fields)
    except ValueError as error:
        message = str(error)
        assert any(field in message for field in fields)
        return
    assert LANGUAGE_MODELS[kind](config)(INPUT_IDS, labels=INPUT_IDS).loss.isfinite()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"depth_sharing": "msa"}, "'depth_sharing'.*'masa'.*got msa"),
        ({"depth_shared_matrices": "qk"}, "'depth_shared_matrices'.*'qkvo'.*got qk"),
        ({"depth_sharing": "masa"}, "'masa' needs num_atoms"),
        ({"depth_sharing": "sequential"}, "'sequential' needs num_groups"),
        ({"depth_sharing": "low_rank"}, "'low_rank' needs rank"),
        ({"num_atoms": 2}, "num_atoms=2 does not go with depth_sharing='none'; it goes with masa"),
        ({"rank": 2}, "rank=2 does not go with depth_sharing='none'"),
        (WAYS["masa"] | {"num_groups": 2}, "num_groups=2 does not go.*sequential, repeat_all_over"),
        (WAYS["masa"] | {"num_atoms": 5}, "num_atoms=5 must be at least 1 and at most num_hidden_layers=4"),
        (WAYS["sequential"] | {"num_groups": 0}, "num_groups=0"),
        (WAYS["low_rank"] | {"rank": 17}, "rank=17.*hidden_size=16"),
        (WAYS["sequential"] | {"coefficient_source": "network"}, "coefficient_source='network'.*'sequential'"),
        (WAYS["masa"] | {"coefficient_init": "zero"}, "'coefficient_init'.*'normal'.*got zero"),
        (WAYS["low_rank"] | {"layer_ranks": [[1]] * 4}, "rank=5 and layer_ranks exclude each other"),
        (WAYS["masa"] | {"layer_ranks": [[1, 1]] * 4}, "layer_ranks=.*4 lists of 3 ranks"),
        (WAYS["masa"] | {"layer_ranks": [[1, 1, 17]] * 4}, "layer_ranks=.*hidden_size=16"),
    ],
)
def test_what_has_no_meaning_is_refused(kind, fields, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(kind, **SHAPE | {"attention_scheme": "standard"} | fields)


# How training starts


def layer_matrices(model) -> dict[str, list[torch.Tensor]]:
    """The weights of all layers, for each linear map that has any."""
    base = model.base_model
    layers = base.encoder.layer if hasattr(base, "encoder") else base.h
    attention = [layer.attention.self if hasattr(layer, "attention") else layer.attn for layer in layers]
    result = {}
    for name in MAPS[model.config.depth_shared_matrices]:
        if model.config.depth_sharing == "low_rank":
            linears = [getattr(module, name) for module in attention]
            result[name] = [
                torch.cat([up @ down for up, down in zip(linear.up, linear.down.split(linear.ranks), strict=True)])
                for linear in linears
            ]
        else:
            result[name] = [weights[MAPS["qkvo"].index(name)] for weights in shared_modules(model, DepthSharing)[0]()]
    return result


@pytest.mark.parametrize(
    "sharing",
    [
        *WAYS.values(),
        *({**WAYS[way], "coefficient_init": "normal"} for way in ("masa", "masa_network")),
        WAYS["masa"] | {"rank": 8},
    ],
    ids=lambda sharing: "-".join(map(str, sharing.values())),
)
def test_matrices_start_with_the_usual_deviation(kind, sharing):
    if sharing["depth_sharing"] == "low_rank":
        sharing = sharing | {"rank": 16}
    model = tiny_model(
        kind, **SHAPE | {"hidden_size": 128}, attention_scheme="standard", depth_shared_matrices="qkvo", **sharing
    )
    matrices = layer_matrices(model)
    assert len(matrices["projection"]) == len(matrices["output"]) == LAYERS
    for name, weights in matrices.items():
        std = 0.02 / (2 * LAYERS) ** 0.5 if kind == "gpt" and name == "output" else 0.02
        for weight in weights:
            for matrix in weight.detach().split(128):
                # Of n = 128² independent entries the deviation is known to 1/√(2n) = 0.55 %; of a product of factors
                # of rank r, whose entries are not independent, to 1/√(128·r) = 2.2 %. Four times that is allowed.
                tolerance = 0.09 if sharing["depth_sharing"] == "low_rank" else 0.022
                assert matrix.std().item() == pytest.approx(std, rel=tolerance)


@pytest.mark.parametrize("init", ["depth", "normal"])
@pytest.mark.parametrize("source", ["direct", "network"])
def test_coefficients_start_with_rows_of_length_one(kind, source, init):
    sharing = WAYS["masa"] | {"coefficient_source": source, "coefficient_init": init}
    model = tiny_model(kind, **SHAPE | {"num_hidden_layers": 5}, **sharing)
    half = 0.5**0.5
    for matrix in shared_modules(model, SharedMatrix):
        coefficients = matrix.layer_coefficients()
        torch.testing.assert_close(coefficients.norm(dim=1), torch.ones(5), rtol=0, atol=1e-4)
        if init == "depth":
            expected = [[1, 0, 0], [half, half, 0], [0, 1, 0], [0, half, half], [0, 0, 1]]
            torch.testing.assert_close(coefficients, torch.tensor(expected), rtol=0, atol=1e-4)
        else:
            assert (coefficients[:, None] - coefficients).abs().sum(-1).fill_diagonal_(1).min() > 0.01


@pytest.mark.parametrize("layers", [1, 2, 40, 100])
def test_the_network_can_start_any_depth(layers):
    """Forty layers are fewer than its channels, a hundred are more than it has by default."""
    sharing = WAYS["masa_network"] | {"num_atoms": layers, "coefficient_init": "normal"}
    model = tiny_model("gpt", SharedGptModel, **SHAPE | {"num_hidden_layers": layers}, **sharing)
    for matrix in shared_modules(model, SharedMatrix):
        torch.testing.assert_close(matrix.layer_coefficients().norm(dim=1), torch.ones(layers), rtol=0, atol=1e-3)


# What is kept


def attention_parameters(**fields) -> int:
    """Counts those of the matrices of all attention layers of a decoder without biases."""
    with torch.device("meta"):
        model = SharedGptModel(SharedGptConfig(attention_scheme="standard", **fields))
    named = {name: p for name, p in model.named_parameters() if ".attn." in name or "depth_sharing" in name}
    return sum(p.numel() for name, p in named.items() if "coefficients" not in name)


@pytest.mark.parametrize(
    ("sharing", "kept"),
    [
        ({"depth_sharing": "masa", "num_atoms": 4, "depth_shared_matrices": "qkvo"}, 1 / 3),
        ({"depth_sharing": "masa", "num_atoms": 4, "depth_shared_matrices": "qkv"}, 1 / 2),
        ({"depth_sharing": "sequential", "num_groups": 4, "depth_shared_matrices": "qkvo"}, 1 / 3),
        ({"depth_sharing": "repeat_all_over", "num_groups": 4, "depth_shared_matrices": "qkvo"}, 1 / 3),
        ({"depth_sharing": "low_rank", "rank": 768 // 6, "depth_shared_matrices": "qkvo"}, 1 / 3),
    ],
)
def test_the_papers_shares_are_kept(sharing, kept):
    assert attention_parameters(**sharing) == kept * attention_parameters()


def test_the_papers_largest_model():
    """Its 226.5 M of attention are 24 layers of 4·1536², its 75 M the same of 8 (it cuts off the decimals)."""
    shape = {"hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 16}
    assert round(attention_parameters(**shape) / 1e6, 1) == 226.5
    kept = attention_parameters(**shape, depth_sharing="masa", num_atoms=8, depth_shared_matrices="qkvo")
    assert kept // 10**6 == 75


# Training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, way, matrices, use_reentrant, input_ids):
    model = make(kind, depth_shared_matrices=matrices, **way).train()
    inputs = {"input_ids": input_ids, "labels": input_ids}
    loss, plain = gradients(model, **inputs)
    checkpoint_activations(model, use_reentrant)
    again_loss, again = gradients(model, **inputs)
    torch.testing.assert_close(again_loss, loss)
    assert plain.keys() == again.keys() == dict(model.named_parameters()).keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("bert", "masa"), ("gpt", "masa_network"), ("bert", "low_rank")])
def test_compiles_without_graph_breaks(kind, name, input_ids):
    model = make(kind, depth_shared_matrices="qkvo", **WAYS[name]).train()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    (loss, expected), (compiled_loss, got) = gradients(model, **inputs), gradients(compiled, **inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled_loss, loss)
    assert len(got) == len(expected)
    for name in expected:
        torch.testing.assert_close(got[f"_orig_mod.{name}"], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ASSEMBLED)
def test_matrices_are_assembled_in_float32_under_autocast(kind, scheme, way, input_ids):
    model = make(kind, attention_scheme=scheme, depth_shared_matrices="qkvo", **WAYS[way])
    unshared = tiny_model(kind, **SHAPE, attention_scheme=scheme)
    own = {name: p for name, p in model.state_dict().items() if "depth_sharing" not in name}
    written_out = {
        f"{LAYER[kind].format(layer)}.{name}.weight": weight
        for name, weights in layer_matrices(model).items()
        for layer, weight in enumerate(weights)
    }
    unshared.load_state_dict(own | written_out)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = logits(model, input_ids), logits(unshared, input_ids)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("way", ["low_rank", "masa"])
def test_caches_are_of_the_type_of_autocast(way, input_ids):
    model = make("gpt", attention_scheme="standard", attention_bias=True, **WAYS[way])
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(input_ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.bfloat16


@pytest.mark.parametrize("way", ASSEMBLED)
def test_matrices_are_assembled_once_per_forward(kind, way, input_ids):
    model = make(kind, attention_scheme="standard", depth_shared_matrices="qkvo", **WAYS[way]).train()
    checkpoint_activations(model, use_reentrant=False)
    calls = []
    for matrix in shared_modules(model, SharedMatrix):
        matrix.register_forward_hook(lambda module, *_: calls.append(module))
    gradients(model, input_ids=input_ids, labels=input_ids)
    assert calls == shared_modules(model, SharedMatrix)
    assert len(calls) == 4


def test_generation_with_a_cache_is_generation_without(way, matrices, input_ids):
    for scheme in ("standard", "shared", "query_free"):
        model = make("gpt", attention_scheme=scheme, depth_shared_matrices=matrices, **way)
        cached, plain = (
            generate(model, input_ids, use_cache=use_cache, do_sample=False) for use_cache in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        for got, expected in zip(cached.logits, plain.logits, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Assembled:
    """Counts how often the matrices of a model are assembled."""

    def __init__(self, model):
        self.times = 0
        shared_modules(model, DepthSharing)[0].register_forward_hook(self.count)

    def count(self, *_):
        self.times += 1


@pytest.mark.parametrize("way", ASSEMBLED)
def test_matrices_are_not_assembled_for_every_token(way, input_ids):
    """Once for the prompt, and once for all tokens after it."""
    model = make("gpt", **WAYS[way])
    assembled = Assembled(model)
    for times in (2, 4):
        generate(model, input_ids, do_sample=False)
        assert assembled.times == times


def double_in_place(model):
    with torch.no_grad():
        shared_modules(model, SharedMatrix)[0].atoms.mul_(2)


def double_by_loading(model):
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})


def double_by_assigning(model):
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def double_by_data(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(2 * vector, model.parameters())


def train_a_step(model):
    """Fused optimizers change parameters in place without counting it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    "change", [double_in_place, double_by_loading, double_by_assigning, double_by_data, train_a_step]
)
@pytest.mark.parametrize("way", ASSEMBLED)
def test_changed_parameters_count_in_the_middle_of_a_generation(way, change, input_ids):
    model = make("gpt", **WAYS[way])
    cache = DynamicCache(config=model.config)
    before = [logits(model, part, past_key_values=cache) for part in input_ids[:, :8].split(4, dim=1)]
    change(model)
    got = logits(model, input_ids[:, 8:], past_key_values=cache)

    # The same steps, where nothing can be kept: the keys of the first ones and the weights of the last.
    twin = make("gpt", **WAYS[way])
    cache = DynamicCache(config=twin.config)
    for part, expected in zip(input_ids[:, :8].split(4, dim=1), before, strict=True):
        torch.testing.assert_close(twin(part, past_key_values=cache).logits, expected)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, twin(input_ids[:, 8:], past_key_values=cache).logits)


def test_a_cache_that_is_used_again_has_the_weights_of_now(input_ids):
    model = make("gpt", **WAYS["masa"])
    cache = StaticCache(config=model.config, max_cache_len=20)
    for factor in (1, 3):
        for parameter in model.parameters():
            parameter.data *= factor
        cache.reset()
        got = [logits(model, part, past_key_values=cache) for part in input_ids.split(6, dim=1)]
        torch.testing.assert_close(torch.cat(got, dim=1), logits(model, input_ids), rtol=1e-4, atol=1e-4)


def test_another_type_in_the_middle_of_a_generation(input_ids):
    model = make("gpt", **WAYS["masa"])
    cache = DynamicCache(config=model.config)
    for part in input_ids[:, :8].split(4, dim=1):
        logits(model, part, past_key_values=cache)
    assert logits(model.double(), input_ids[:, 8:], past_key_values=cache).dtype == torch.float64


@pytest.mark.parametrize("way", ["masa", "masa_network"])
def test_parameters_given_by_torch_func(kind, way, input_ids):
    model = make(kind, **WAYS[way])
    expected = logits(model, input_ids)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (input_ids,)).logits, expected)


def test_a_gradient_passes_through_matrices_in_a_generation(input_ids):
    model = make("gpt", **WAYS["masa"])
    cache = DynamicCache(config=model.config)
    for part in input_ids[:, :8].split(4, dim=1):
        logits(model, part, past_key_values=cache)
    model(input_ids[:, 8:], past_key_values=cache).logits.sum().backward()
    assert shared_modules(model, SharedMatrix)[0].atoms.grad.any()


def test_a_model_made_in_inference_mode_generates(input_ids):
    """Its parameters do not count their changes."""
    with torch.inference_mode():
        model = make("gpt", **WAYS["masa"])
        double_in_place(model)
        written = generate(model, input_ids, do_sample=False).sequences
        assert torch.equal(written, generate(model, input_ids, do_sample=False, use_cache=False).sequences)


def test_nothing_is_kept_when_a_generation_is_over(input_ids):
    model = make("gpt", **WAYS["masa"])
    gc.collect()
    depth_sharing._KEPT.clear()
    prompts = [DynamicCache(config=model.config) for _ in range(3)]
    for cache in prompts:
        logits(model, input_ids[:, :8], past_key_values=cache)
    assert not depth_sharing._KEPT
    logits(model, input_ids[:, 8:], past_key_values=cache)
    assert cache in depth_sharing._KEPT
    copy.deepcopy(model), pickle.dumps(cache)
    del cache, prompts
    gc.collect()
    assert not depth_sharing._KEPT


# Saving


@pytest.mark.parametrize("residual", [None, 3])
def test_shared_tensors_are_saved_once_and_load_bit_by_bit(kind, scheme, way, residual, input_ids, tmp_path):
    sharing = way if residual is None else way | {"rank": residual}
    model = make(kind, attention_scheme=scheme, depth_shared_matrices="qkvo", **sharing)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = file.keys()
        sizes = [file.get_tensor(name).numel() for name in names]
    assert set(names) == dict(model.named_parameters()).keys() <= model.state_dict().keys()
    assert sum(sizes) == model.num_parameters()

    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    torch.testing.assert_close(logits(loaded.eval(), input_ids), logits(model, input_ids))


def test_fixed_coefficients_are_those_of_the_network(kind, input_ids, tmp_path):
    model = make(kind, depth_shared_matrices="qkvo", **WAYS["masa_network"])
    expected = logits(model, input_ids)
    fix_coefficients(model)
    torch.testing.assert_close(logits(model, input_ids), expected)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.coefficient_source == "direct"
    torch.testing.assert_close(logits(loaded.eval(), input_ids), expected)


@pytest.mark.parametrize("way", ["masa", "sequential"])
def test_there_is_nothing_to_fix_without_a_network(kind, way):
    model = make(kind, **WAYS[way])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fix_coefficients(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
