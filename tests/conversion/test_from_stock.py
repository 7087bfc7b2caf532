"""`from_stock` keeps what the new model can express, fits the rest as well as can be, and says what it lost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForPreTraining, BertModel, GPT2Config, GPT2LMHeadModel

import shared_bert
from shared_bert import SCHEMES, from_stock, to_stock
from shared_bert.conversion.calibration import calibrate
from shared_bert.conversion.dense import attention_layers, dense_layers, depth_sharing_of
from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.conversion.fitting import nearest_rotation
from shared_bert.conversion.stock import read_stock

from ..conftest import NO_DROPOUT, TINY, TOKENS
from .test_to_stock import random_model

LAYERS, HIDDEN, HEADS = 3, TINY["hidden_size"], TINY["num_attention_heads"]
HEAD_DIM = HIDDEN // HEADS
LANGUAGE_MODELS = {"bert": shared_bert.SharedBertForMaskedLM, "gpt": shared_bert.SharedGptForCausalLM}
FULL_CAPACITY = [
    {"depth_sharing": "masa", "num_atoms": LAYERS},
    {"depth_sharing": "masa", "num_atoms": LAYERS, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "masa", "num_atoms": 1, "rank": HIDDEN, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "sequential", "num_groups": LAYERS, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "repeat_all_over", "num_groups": LAYERS},
    {"depth_sharing": "low_rank", "rank": HIDDEN, "depth_shared_matrices": "qkvo"},
]


def random_stock(kind: str):
    return to_stock(random_model(LANGUAGE_MODELS[kind], attention_scheme="standard", attention_bias=True))


@pytest.fixture
def batches(input_ids) -> list[dict[str, torch.Tensor]]:
    """Text with padding, in two batches."""
    generator = torch.Generator().manual_seed(1)
    more = torch.randint(3, TINY["vocab_size"], (16, 12), generator=generator)
    mask = torch.ones_like(more)
    mask[3, 7:] = 0
    return [{"input_ids": input_ids}, {"input_ids": more, "attention_mask": mask}]


def assert_same_outputs(model, other, input_ids, tolerance=1e-4):
    with torch.no_grad():
        expected, found = model(input_ids).logits, other(input_ids).logits
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(
    "options", [{"attention_scheme": "shared_kv"}, {"depth_sharing": "low_rank", "rank": 8}], ids=str
)
def test_the_generation_config_is_kept(options):
    stock = random_stock("gpt")
    stock.generation_config.update(repetition_penalty=1.3, eos_token_id=[2, 7])
    for source in (stock, read_stock(stock)):
        converted, _ = from_stock(source, **options)
        assert converted.generation_config.to_dict() == stock.generation_config.to_dict()
        assert converted.generation_config is not stock.generation_config


@pytest.mark.parametrize("options", FULL_CAPACITY, ids=str)
@pytest.mark.parametrize("align", [True, False])
def test_full_capacity_loses_nothing(kind, options, align, input_ids):
    stock = random_stock(kind)
    converted, report = from_stock(stock, align=align, **options)
    assert converted.config.depth_sharing == options["depth_sharing"]
    assert_same_outputs(stock, converted, input_ids)
    assert max(report.all_errors().values()) < 1e-5


@pytest.mark.parametrize("options", FULL_CAPACITY, ids=str)
def test_full_capacity_loses_nothing_with_text(kind, options, input_ids, batches):
    stock = random_stock(kind)
    converted, _ = from_stock(stock, calibration=batches, **options)
    assert_same_outputs(stock, converted, input_ids)


def exact_model(kind: str, scheme: str, **fields):
    """A model in float64, whose diagonals have both signs and whose pairwise matrices are normal."""
    model = random_model(LANGUAGE_MODELS[kind], attention_scheme=scheme, **{"attention_bias": True, **fields}).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_diagonal", "pairwise")):
                parameter.normal_()
    return model


GROUPABLE = [name for name, row in SCHEMES.items() if row.can_group]


@pytest.mark.parametrize("text", ["none", "some", "little"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, {}) for name in SCHEMES]
    + [(name, {"num_key_value_heads": 2}) for name in GROUPABLE]
    + [("shared", {"attention_bias": False}), ("query_free", {"attention_scale": 0.7})],
)
def test_a_shared_model_comes_back(kind, name, fields, text, input_ids, batches):
    """Whether its scheme is known or found in its stock form, and where the text leaves directions unknown."""
    model = exact_model(kind, name, **fields)
    kept = {field: value for field, value in fields.items() if field != "attention_bias"}
    calibration = {"none": None, "some": batches, "little": 2 * [{"input_ids": input_ids}]}[text]
    for source in (model, to_stock(model)):
        converted, report = from_stock(source, name, calibration=calibration, **kept)
        assert converted.config.attention_scheme == name
        assert_same_outputs(model, converted, input_ids, 1e-10)
        assert report.all_errors()["result"] < 1e-10


def test_a_channel_that_counts_little_comes_back(kind, input_ids, batches):
    """``unified``, from its stock form: no least size of a channel changes what is exact."""
    model = exact_model(kind, "unified")
    with torch.no_grad():
        for attention in attention_layers(model):
            attention.projection.weight.mul_(torch.logspace(0, -3, HEAD_DIM).repeat(HEADS)[:, None])
            attention.output.weight.div_(torch.logspace(0, -3, HEAD_DIM).repeat(HEADS))
    for calibration in (None, batches):
        converted, _ = from_stock(to_stock(model), "unified", calibration=calibration)
        assert_same_outputs(model, converted, input_ids, 1e-7)


@pytest.mark.parametrize(
    "sharing",
    [
        {"depth_sharing": "masa", "num_atoms": 2, "depth_shared_matrices": "qkvo"},
        {"depth_sharing": "sequential", "num_groups": 2},
        {"depth_sharing": "repeat_all_over", "num_groups": 2, "depth_shared_matrices": "qkvo"},
        {"depth_sharing": "low_rank", "rank": 5},
    ],
    ids=lambda sharing: sharing["depth_sharing"],
)
def test_a_model_with_shared_depth_comes_back(scheme, sharing, input_ids, batches):
    model = exact_model("bert", scheme, **sharing)
    for calibration in (None, batches):
        converted, _ = from_stock(model, scheme, calibration=calibration, **sharing)
        assert_same_outputs(model, converted, input_ids, 1e-10)


@pytest.mark.parametrize("cls", STOCK_CLASSES, ids=lambda cls: cls.__name__)
def test_every_head_is_kept(cls, input_ids, batches):
    stock = to_stock(random_model(cls, attention_scheme="standard", attention_bias=True))
    converted, _ = from_stock(stock, depth_sharing="masa", num_atoms=LAYERS, calibration=batches)
    assert type(converted) is cls
    ids = input_ids.unsqueeze(0) if "MultipleChoice" in cls.__name__ else input_ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, found = stock(**inputs), converted(**inputs)
    for name in ("last_hidden_state", "pooler_output", "logits", "start_logits"):
        if name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-3)


def products(layer, root: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention knows of a layer: W_q·W_kᵀ and W_v·W_o of each head, [heads, hidden, hidden].

    With the root of the inputs' autocorrelation, [hidden, hidden], as they are measured on the inputs.
    """
    query, key, value = (role.weight.view(HEADS, HEAD_DIM, -1) for role in (layer.query, layer.key, layer.value))
    if root is not None:
        query, key, value = query @ root, key @ root, value @ root
    return query.mT @ key, value.mT @ layer.output.weight.T.reshape(HEADS, HEAD_DIM, -1)


def loss_of(found, expected) -> torch.Tensor:
    """The objective of the fits: the relative squared errors of the logits' and the result's matrices, by head."""
    return sum(
        ((f - e).square().sum((1, 2)) / e.square().sum((1, 2))).sum() for f, e in zip(found, expected, strict=True)
    )


def best_by_descent(loss, shapes, starts: int) -> float:
    """The least loss that descents from random starts find."""
    losses = []
    for seed in range(starts):
        generator = torch.Generator().manual_seed(seed)
        parameters = [
            torch.randn(s, generator=generator, dtype=torch.float64).mul(0.3).requires_grad_() for s in shapes
        ]
        optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

        def closure(parameters=parameters, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(*parameters)
            value.backward()
            return value

        optimizer.step(closure)
        losses.append(closure().item())
    return min(losses)


TALL, WIDE, SQUARE = (HEADS, HIDDEN, HEAD_DIM), (HEADS, HEAD_DIM, HIDDEN), (HEADS, HEAD_DIM, HEAD_DIM)
GROUPED = (HEADS // 2, HIDDEN, HEAD_DIM)


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("symmetric", [TALL]),
        ("pairwise", [TALL, SQUARE]),
        ("shared", [TALL, (HEADS, 1, HEAD_DIM), WIDE]),
        ("unified", [TALL, WIDE]),
        ("shared_kv", [TALL, TALL, WIDE]),
        ("query_free", [TALL]),
        ("key_free", [TALL]),
        ("value_free", [WIDE]),
        ("standard, grouped", [TALL, GROUPED, GROUPED, WIDE]),
        ("shared_kv, grouped", [TALL, GROUPED, WIDE]),
        ("query_free, grouped", [GROUPED, GROUPED, WIDE]),
    ],
)
def test_the_fit_is_as_good_as_descent(name, shapes, with_text, batches):
    """Literal forms of the schemes, trained on the objective, do not do better than the fits."""
    stock = random_stock("bert")
    source = read_stock(stock)
    root = torch.eye(HIDDEN, dtype=torch.float64)
    if with_text:  # directions that it hardly has count with a thousandth of the mean
        seen = calibrate(source, batches).inputs[0]
        eigenvalues, vectors = torch.linalg.eigh(seen + 1e-3 * seen.diagonal().mean() * root)
        root = vectors * eigenvalues.sqrt() @ vectors.mT
    scheme, *grouped = name.split(", ")
    options = {"num_key_value_heads": 2} if grouped else {}
    converted, _ = from_stock(stock, scheme, calibration=batches if with_text else None, **options)
    old = dense_layers(source)[0]
    value = old.value.weight.view(HEADS, HEAD_DIM, HIDDEN).mT
    output = old.output.weight.T.reshape(WIDE)
    query, key = (role.weight.view(HEADS, HEAD_DIM, HIDDEN).mT for role in (old.query, old.key))
    slices = torch.eye(HIDDEN, dtype=torch.float64).view(HEADS, HEAD_DIM, HIDDEN).mT

    def per_head(group):
        return group.repeat_interleave(2, 0)

    literal = {  # query, key, value and output of each head
        "symmetric": lambda p: (p, p, value, output),
        "pairwise": lambda p, u: (p, p @ u, value, output),
        "shared": lambda s, e, o: (s * e, s, s, o),
        "unified": lambda s, o: (s, s, s, o),
        "shared_kv": lambda q, p, o: (q, p, p, o),
        "query_free": lambda k: (slices, k, value, output),
        "key_free": lambda q: (q, slices, value, output),
        "value_free": lambda o: (query, key, slices, o),
        "standard, grouped": lambda q, k, v, o: (q, per_head(k), per_head(v), o),
        "shared_kv, grouped": lambda q, p, o: (q, per_head(p), per_head(p), o),
        "query_free, grouped": lambda k, v, o: (slices, per_head(k), per_head(v), o),
    }[name]
    expected = products(old, root)

    def loss(*parameters):
        q, k, v, o = literal(*parameters)
        return loss_of((root @ q @ k.mT @ root, root @ v @ o), expected)

    found = float(loss_of(products(dense_layers(converted)[0], root), expected))
    by_iteration = scheme in ("pairwise", "shared", "unified")
    assert found <= 1.0005 * best_by_descent(loss, shapes, starts=2 if by_iteration else 1)


def test_the_shared_fit_beats_rank_one_columns():
    """The best rank-one fit of (w_q, w_k, w_v) column by column, with rotations of heads, is a special case."""
    stock = random_stock("bert")
    source = dense_layers(read_stock(stock))[0]
    query, key, value = (role.weight.view(HEADS, HEAD_DIM, -1).mT for role in (source.query, source.key, source.value))
    turn, turn_value = (torch.eye(HEAD_DIM, dtype=torch.float64).expand(SQUARE) for _ in range(2))
    for _ in range(100):
        columns = torch.stack([query @ turn, key @ turn, value @ turn_value], dim=-1).transpose(1, 2)
        left, sizes, right = torch.linalg.svd(columns, full_matrices=False)
        single = (left[..., 0] * sizes[..., :1]).mT  # S, one column per channel
        fits = [single * right[:, None, :, 0, role] for role in range(3)]
        turn = nearest_rotation(torch.cat([query, key], 1), torch.cat(fits[:2], 1))
        turn_value = nearest_rotation(value, fits[2])
    output = turn_value.mT @ source.output.weight.T.reshape(WIDE)
    columnwise = fits[0] @ fits[1].mT, fits[2] @ output
    converted = dense_layers(from_stock(stock, "shared")[0])[0]
    assert loss_of(products(converted), products(source)) < loss_of(columnwise, products(source))


def turned_copies(scheme: str) -> torch.nn.Module:
    """A model whose layers do the same by matrices that look different: heads in other orders, and rotated."""
    model = random_model(shared_bert.SharedBertForMaskedLM, attention_scheme=scheme, num_hidden_layers=LAYERS)
    row = SCHEMES[scheme]
    first, *others = attention_layers(model)
    for seed, layer in enumerate(others):
        generator = torch.Generator().manual_seed(seed)
        rotations = torch.linalg.qr(torch.randn(2, HEADS, HEAD_DIM, HEAD_DIM, generator=generator)).Q
        turn, turn_value = rotations if not row.key_is_value else (rotations[0], rotations[0])
        order = torch.randperm(HEADS, generator=generator)
        if "x" in (row.query, row.key, row.value):
            order = torch.arange(HEADS)  # the heads of the input stand where they are
        identity = torch.eye(HEAD_DIM).expand(SQUARE)
        turns = {row.query: turn, row.key: turn, row.value: turn_value}
        if not row.ingredient.can_turn:
            turns = dict.fromkeys(turns, identity)
        for free in ("x" in (row.query, row.key)) * [row.query, row.key] + (row.value == "x") * ["x"]:
            turns[free] = identity
        with torch.no_grad():
            layer.load_state_dict(first.state_dict())
            for tensor in (layer.projection.weight, layer.projection.bias):
                for name, part in zip(row.matrices, tensor.split(HIDDEN), strict=True):
                    heads = part.view(HEADS, HEAD_DIM, -1)
                    heads.copy_((turns[name].mT @ heads)[order])
            back = turns[row.value]
            columns = layer.output.weight.T.reshape(WIDE)
            layer.output.weight.copy_((back.mT @ columns)[order].reshape(HIDDEN, HIDDEN).T)
            if not row.ingredient.can_turn:
                for diagonal in (layer.query_diagonal, layer.key_diagonal, layer.value_diagonal):
                    diagonal.copy_(diagonal.view(HEADS, HEAD_DIM)[order].flatten())
            if hasattr(layer, "pairwise"):
                layer.pairwise.copy_((turn.mT @ layer.pairwise @ turn)[order])
    return model


def test_alignment_finds_layers_that_differ_by_rotations_and_order_only(scheme, input_ids):
    model = turned_copies(scheme)
    one = {"depth_sharing": "sequential", "num_groups": 1, "depth_shared_matrices": "qkvo"}
    aligned, report = from_stock(model, scheme, **one)
    assert_same_outputs(model, aligned, input_ids)
    assert max(report.all_errors().values()) < 1e-4
    assert max(from_stock(model, scheme, align=False, **one)[1].all_errors().values()) > 0.1


@pytest.mark.parametrize("with_text", [False, True])
def test_alignment_lowers_the_error(kind, with_text, batches):
    options = {"depth_sharing": "masa", "num_atoms": 2, "calibration": batches if with_text else None}
    stock = random_stock(kind)
    errors = [from_stock(stock, align=align, **options)[1].all_errors() for align in (True, False)]
    aligned, plain = (sum(row[role] ** 2 for role in ("query", "key", "value")) for row in errors)
    assert aligned < plain


def test_grouped_heads_are_aligned(kind, input_ids):
    model = exact_model(kind, "standard", num_key_value_heads=2).float()
    options = {"depth_sharing": "masa", "num_key_value_heads": 2, "depth_shared_matrices": "qkvo"}
    assert_same_outputs(model, from_stock(model, num_atoms=LAYERS, **options)[0], input_ids)
    errors = [from_stock(model, align=align, num_atoms=1, **options)[1].all_errors() for align in (True, False)]
    aligned, plain = (sum(row[name] ** 2 for name in ("logits", "result")) for row in errors)
    assert aligned < plain


@settings(max_examples=25, deadline=None)
@given(st.integers(1, LAYERS), st.booleans(), st.integers(0, 99))
def test_masa_is_the_pca_of_the_layers(num_atoms, over_output, seed):
    """No other dictionary of that size is nearer to the layers: the error is what the singular values leave."""
    torch.manual_seed(seed)
    stock = BertModel(BertConfig(**{**TINY, **NO_DROPOUT, "num_hidden_layers": LAYERS}))
    matrices = "qkvo" if over_output else "qkv"
    converted, _ = from_stock(
        stock, depth_sharing="masa", num_atoms=num_atoms, depth_shared_matrices=matrices, align=False
    )
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    for letter in matrices:
        stack = torch.stack(
            [getattr(layer, names[letter]).weight.flatten() for layer in dense_layers(read_stock(stock))]
        )
        fitted = torch.stack([getattr(layer, names[letter]).weight.flatten() for layer in dense_layers(converted)])
        left = torch.linalg.svdvals(stack)[num_atoms:].square().sum()
        assert float((fitted - stack).square().sum()) == pytest.approx(float(left), rel=1e-4, abs=1e-8)


def test_groups_share_the_mean_of_their_layers():
    stock = random_stock("bert")
    options = {"depth_sharing": "sequential", "num_groups": 2, "align": False}
    old, new = dense_layers(read_stock(stock)), dense_layers(from_stock(stock, **options)[0])
    torch.testing.assert_close(new[0].key.weight, (old[0].key.weight + old[1].key.weight) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new[2].key.weight, old[2].key.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_text", [False, True])
def test_low_rank_is_the_best_of_its_rank(with_text, batches):
    """On calibration text it is the best for the outputs: those of W·x over all tokens x."""
    stock, rank = random_stock("bert"), 5
    calibration = batches if with_text else None
    options = {"depth_sharing": "low_rank", "rank": rank, "depth_shared_matrices": "qkvo", "calibration": calibration}
    new = dense_layers(from_stock(stock, **options)[0])[0]
    source = read_stock(stock)
    seen = calibrate(source, batches)
    for role, autocorrelation in (("query", seen.inputs[0]), ("value", seen.inputs[0]), ("output", seen.contexts[0])):
        weight = getattr(dense_layers(source)[0], role).weight
        # Any square root will do.
        root = torch.linalg.cholesky(autocorrelation + 1e-9 * torch.eye(HIDDEN)) if with_text else torch.eye(HIDDEN)
        root = root.double()
        least = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
        found = ((getattr(new, role).weight - weight) @ root).square().sum()
        assert float(found) == pytest.approx(float(least), rel=0.02)
        assert torch.linalg.matrix_rank(getattr(new, role).weight, rtol=1e-5) == rank


def test_calibration_text_lowers_the_error_on_it(batches):
    stock = random_stock("bert")
    text = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        expected = stock(text).logits
        for options in (
            {"attention_scheme": "pairwise"},
            {"attention_scheme": "shared_kv"},
            {"depth_sharing": "low_rank", "rank": 6},
        ):
            errors = [
                float((from_stock(stock, calibration=given, **options)[0](text).logits - expected).norm())
                for given in (None, batches)
            ]
            assert errors[1] < errors[0], options


def test_a_residual_of_low_rank_lowers_the_error_and_spreading_it_more():
    stock = random_stock("bert")
    with torch.no_grad():  # one matrix that two atoms leave far off, among others that they do not
        stock.bert.encoder.layer[2].attention.self.query.weight.mul_(4)
    masa = {"depth_sharing": "masa", "num_atoms": 2, "align": False}
    (_, plain), (_, ranked), (model, spread) = (
        from_stock(stock, **masa, **options) for options in ({}, {"rank": 2}, {"rank": 2, "spread_rank": True})
    )
    assert ranked.all_errors()["query"] < plain.all_errors()["query"]
    assert spread.parameters_after <= ranked.parameters_after
    assert model.config.layer_ranks == spread.layer_ranks
    total = [sum(report.all_errors()[role] ** 2 for role in ("query", "key", "value")) for report in (ranked, spread)]
    assert total[1] < total[0]
    assert len({rank for row in spread.layer_ranks for rank in row}) > 1


def test_grouped_heads_that_differ_by_a_rotation_lose_nothing():
    stock = random_stock("bert")
    model = read_stock(stock)
    with torch.no_grad():
        for layer in attention_layers(model):
            query, key, value = (part.view(HEADS, HEAD_DIM, HIDDEN) for part in layer.projection.weight.split(HIDDEN))
            turn = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM)).Q
            for role in (query, key, value):
                role[1::2] = role[::2]
            key[1::2], query[1::2] = turn @ key[::2], turn @ query[::2]
            layer.projection.bias.zero_()
    converted, report = from_stock(model, num_key_value_heads=2)
    assert attention_layers(converted)[0].projection.weight.shape == (2 * HIDDEN, HIDDEN)
    assert report.all_errors()["logits"] < 1e-5
    assert report.all_errors()["value"] < 1e-5


def test_calibration_measures_what_the_matrices_are_given(kind, batches):
    model = random_model(LANGUAGE_MODELS[kind], attention_scheme="standard")
    seen = calibrate(model, batches)
    states = []
    for batch in batches:
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
        is_text = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        states.append([state[is_text] for state in hidden])
    first = torch.cat([rows[0] for rows in states]).double()
    second = torch.cat([rows[1] for rows in states])
    if kind == "gpt":
        inputs = model.transformer.h[0].ln_1(first.float()).double()
        read = [model.lm_head(model.transformer.ln_f(rows)) for rows in (first.float(), second)]
    else:
        inputs = first
        read = [model.cls.predictions(rows) for rows in (first.float(), second)]
    torch.testing.assert_close(seen.inputs[0], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)
    before, after = (logits.double().softmax(-1) for logits in read)
    divergence = (before * (before / after).log()).sum(-1).mean()
    assert seen.drift[0] == pytest.approx(divergence.item(), rel=1e-3)


def test_a_dictionary_is_cut_where_the_outputs_drift(batches):
    stock = random_stock("bert")
    with torch.no_grad():  # the second layer alone turns everything round
        layer = stock.bert.encoder.layer[1]
        layer.output.LayerNorm.weight.neg_()
    drift = calibrate(read_stock(stock), batches).drift
    assert max(range(LAYERS), key=lambda i: drift[i]) == 1
    converted, report = from_stock(stock, depth_sharing="masa", num_atoms=2, dictionary_groups=2, calibration=batches)
    assert report.dictionary_groups == [(0, 1, 1), (1, LAYERS, 1)]
    for shared in depth_sharing_of(converted).values():
        assert shared.coefficients[0, 1] == 0
        assert shared.coefficients[1:, 0].abs().max() == 0
        assert shared.coefficients[1:, 1].abs().min() > 0


def test_the_report_says_what_the_weights_say(scheme):
    stock = random_stock("bert")
    converted, report = from_stock(stock, scheme)
    old, new = dense_layers(read_stock(stock)), dense_layers(converted)
    for row, before, after in zip(report.errors, old, new, strict=True):
        for found, expected, column in zip(products(after), products(before), ("logits", "result"), strict=True):
            assert row[column] == pytest.approx(float((found - expected).norm() / expected.norm()), abs=1e-6)
    assert report.parameters_before == LAYERS * 4 * (HIDDEN**2 + HIDDEN)
    assert report.total_before - report.total_after == report.parameters_before - report.parameters_after
    assert report.total_after == converted.num_parameters()
    lines = str(report).splitlines()
    assert len(lines) == 2 + LAYERS + 1 + 2
    assert f"{report.errors[0]['query']:.4f}" in lines[2]
    assert f"{report.parameters_after:,}" in lines[-2]


def test_converted_models_are_saved_and_trained(tmp_path, input_ids):
    options = {"depth_sharing": "masa", "num_atoms": 2, "rank": 2, "spread_rank": True}
    model, _ = from_stock(random_stock("bert"), "pairwise", **options)
    model.save_pretrained(tmp_path)
    again = shared_bert.SharedBertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits)
    model(input_ids, labels=input_ids).loss.backward()
    assert all(math.isfinite(float(p.grad.norm())) for p in model.parameters())


def test_the_source_stays_as_it_is(batches):
    stock = random_stock("gpt")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    from_stock(stock, "shared", "masa", num_atoms=1, calibration=batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_scheme": "shard"}, "attention_scheme='shard'"),
        ({"depth_sharing": "masa", "num_atoms": LAYERS + 1}, "num_atoms=4"),
        ({"depth_sharing": "masa"}, "needs num_atoms"),
        ({"depth_sharing": "low_rank", "rank": HIDDEN + 1}, "rank=33"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"attention_scheme": "shared", "num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"hidden_size": 64}, "hidden_size=64"),
        ({"calibration": []}, "0 tokens, fewer than hidden_size=32"),
        ({"calibration": [torch.ones(2, 40)]}, "mapping with input_ids"),
        ({"dictionary_groups": 2}, "dictionary_groups=2"),
        ({"depth_sharing": "masa", "num_atoms": 2, "dictionary_groups": 2}, "give calibration"),
        ({"depth_sharing": "masa", "num_atoms": 1, "dictionary_groups": 2}, "num_atoms=1"),
        ({"depth_sharing": "masa", "num_atoms": 1, "spread_rank": True}, "give rank"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        from_stock(random_stock("bert"), **options)


def test_unknown_models_are_named():
    config = BertConfig(**TINY, **NO_DROPOUT)
    with pytest.raises(ValueError, match="BertForPreTraining cannot be converted"):
        from_stock(BertForPreTraining(config))
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, add_cross_attention=True, **TOKENS)
    with pytest.raises(ValueError, match="add_cross_attention"):
        from_stock(GPT2LMHeadModel(gpt2))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named(name):
    stock = random_stock("bert")
    with torch.no_grad():
        getattr(stock.bert.encoder.layer[1].attention.self.key, name)[0] = math.nan
    with pytest.raises(ValueError, match="layer 1"):
        from_stock(stock, "shared")


def test_a_missing_scipy_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"shared_bert\[convert\]"):
        from_stock(random_stock("bert"), depth_sharing="sequential", num_groups=2)


def test_pruned_heads_stay_pruned(scheme, input_ids, batches):
    """A head whose query, or whose value, is zero has no best fit of its own, and must not spoil the others."""
    stock = random_stock("bert")
    with torch.no_grad():
        attention = stock.bert.encoder.layer[0].attention.self
        attention.query.weight[:HEAD_DIM] = attention.query.bias[:HEAD_DIM] = 0
        attention.value.weight[HEAD_DIM : 2 * HEAD_DIM] = 0
    for calibration in (None, batches):
        converted, report = from_stock(stock, scheme, calibration=calibration)
        assert all(math.isfinite(error) for row in report.errors for error in row.values())
        assert converted(input_ids).logits.isfinite().all()


def test_the_report_is_of_the_inputs_where_they_are_known(batches):
    """With text, the error is that of query · key over all pairs of inputs, head by head."""
    stock = random_stock("bert")
    source = read_stock(stock)
    converted, report = from_stock(stock, "pairwise", calibration=batches)
    assert report.measured_on == "inputs"
    old, new = (products(dense_layers(model)[0])[0] for model in (source, converted))
    states = []
    with torch.no_grad():
        for batch in batches:
            is_text = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            states.append(source(**batch, output_hidden_states=True).hidden_states[0][is_text].double())
    inputs = torch.cat(states)
    logits, fitted = inputs @ old @ inputs.T, inputs @ new @ inputs.T
    assert report.errors[0]["logits"] == pytest.approx(float((fitted - logits).norm() / logits.norm()), rel=0.02)
    weights_only, _ = from_stock(stock, "pairwise")
    unseeing = inputs @ products(dense_layers(weights_only)[0])[0] @ inputs.T
    assert (fitted - logits).norm() < (unseeing - logits).norm()


def test_a_model_without_biases_stays_without(input_ids):
    model = random_model(shared_bert.SharedGptForCausalLM, attention_scheme="shared")
    converted, report = from_stock(model, "shared")
    assert not converted.config.attention_bias
    assert not converted.config.mlp_bias
    assert report.total_after == report.total_before
    assert_same_outputs(model, converted, input_ids)
    larger, report = from_stock(model, "standard")
    assert "more)" in str(report)
    assert_same_outputs(model, larger, input_ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    "options", [*({"attention_scheme": name} for name in SCHEMES), FULL_CAPACITY[0], {**FULL_CAPACITY[2], "rank": 3}]
)
def test_a_gpu_fits_as_the_cpu(kind, options, input_ids, batches):
    stock = random_stock(kind)
    expected, _ = from_stock(stock, calibration=batches, **options)
    found, _ = from_stock(stock.cuda(), calibration=batches, **options)
    assert found.device.type == "cuda"
    assert_same_outputs(expected, found.cpu(), input_ids, tolerance=1e-2)
