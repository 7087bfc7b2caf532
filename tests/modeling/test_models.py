"""What must hold for both models: stock parity, counts, masks, packing, compilation, saving."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)

import shared_bert
from tests.conftest import NO_DROPOUT, TINY, TOKENS, tiny_config, tiny_model

ALL_BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "hidden_act": "gelu_new"}
STANDARD = {"bert": {"attention_scheme": "standard"}, "gpt": {"attention_scheme": "standard"} | ALL_BIASES}


def stock_config(kind):
    if kind == "bert":
        return BertConfig(**TINY, **NO_DROPOUT)
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=99, n_positions=40, **TOKENS)


@pytest.fixture(params=["eager", "sdpa", "flex_attention"])
def implementation(request):
    # transformers compiles flex attention; its eager form says the same in a hundredth of the time.
    with torch.compiler.set_stance("force_eager" if request.param == "flex_attention" else "default"):
        yield request.param


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


HEADS = [
    ("bert", shared_bert.SharedBertForMaskedLM, BertForMaskedLM),
    ("bert", shared_bert.SharedBertForSequenceClassification, BertForSequenceClassification),
    ("bert", shared_bert.SharedBertForTokenClassification, BertForTokenClassification),
    ("bert", shared_bert.SharedBertForQuestionAnswering, BertForQuestionAnswering),
    ("bert", shared_bert.SharedBertForMultipleChoice, BertForMultipleChoice),
    ("gpt", shared_bert.SharedGptForCausalLM, GPT2LMHeadModel),
    ("gpt", shared_bert.SharedGptForSequenceClassification, GPT2ForSequenceClassification),
    ("gpt", shared_bert.SharedGptForTokenClassification, GPT2ForTokenClassification),
]


@pytest.mark.parametrize(("kind", "ours", "stock"), HEADS, ids=lambda x: getattr(x, "__name__", x))
def test_standard_is_the_stock_model(kind, ours, stock, input_ids):
    torch.manual_seed(0)
    stock = stock(stock_config(kind)).eval()
    model = tiny_model(kind, ours, **STANDARD[kind])
    model.load_state_dict(stock.state_dict())
    mask = torch.ones_like(input_ids)
    mask[1, 8:] = 0
    input_ids[1, 8:] = 0
    shape = (2, 2, 6) if "MultipleChoice" in ours.__name__ else (2, 12)
    inputs = {"input_ids": input_ids.view(shape), "attention_mask": mask.view(shape)}
    with torch.no_grad():
        got, expected = model(**inputs), stock(**inputs)
    for name in expected:
        if "logits" in name:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


def test_an_untied_stock_head_keeps_the_bias_it_adds(input_ids):
    """Stock has two biases then, of which it adds and trains the decoder's."""
    torch.manual_seed(0)
    stock = BertForMaskedLM(BertConfig(**TINY, **NO_DROPOUT, tie_word_embeddings=False)).eval()
    torch.nn.init.normal_(stock.cls.predictions.decoder.bias)
    model = tiny_model("bert", attention_scheme="standard", tie_word_embeddings=False)
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(logits(model, input_ids), logits(stock, input_ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "ours", "stock"), HEADS[1:5] + HEADS[6:], ids=lambda x: getattr(x, "__name__", x))
def test_losses_of_the_heads_are_the_stock_ones(kind, ours, stock, input_ids):
    torch.manual_seed(0)
    stock = stock(stock_config(kind)).eval()
    model = tiny_model(kind, ours, **STANDARD[kind])
    model.load_state_dict(stock.state_dict())
    per_token = torch.randint(2, (2, 12))
    per_token[0, :3] = -100
    two = torch.tensor([1, 0])
    labels = {
        "SequenceClassification": {"labels": two},
        "TokenClassification": {"labels": per_token},
        "QuestionAnswering": {"start_positions": torch.tensor([3, 99]), "end_positions": torch.tensor([5, 99])},
        "MultipleChoice": {"labels": two},
    }[ours.__name__.split("For")[1]]
    ids = input_ids.view(2, 2, 6) if "MultipleChoice" in ours.__name__ else input_ids
    torch.testing.assert_close(model(ids, **labels).loss, stock(ids, **labels).loss)


@pytest.mark.parametrize(("kind", "ours"), [head[:2] for head in HEADS if "LM" not in head[1].__name__])
def test_trainer_averages_accumulated_batches(kind, ours):
    """Trainer divides the losses of heads that take no count of items, and only those."""
    assert not getattr(ours, "accepts_loss_kwargs", True)


def test_trainer_knows_which_labels_to_shift():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    assert "SharedGptForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert "SharedBertForMaskedLM" in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


@pytest.mark.parametrize("training", [False, True])
def test_shifted_labels_take_the_place_of_labels(training, input_ids):
    """Training that splits sequences over devices shifts labels before it does, as a part ends too early to."""
    model = tiny_model("gpt").train(training)
    following = torch.randint(3, 99, input_ids.shape)
    following[0, :4] = -100
    loss = model(input_ids, labels=input_ids, shift_labels=following).loss
    expected = torch.nn.functional.cross_entropy(model(input_ids).logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(loss, expected)


def test_a_classifier_goes_on_from_a_cache(input_ids):
    model = tiny_model("gpt", shared_bert.SharedGptForSequenceClassification)
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        whole = model(input_ids, attention_mask=mask).logits
        past = model(input_ids[:, :7], use_cache=True, attention_mask=mask[:, :7]).past_key_values
        rest = model(input_ids[:, 7:], past_key_values=past, attention_mask=mask).logits
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-5)


def test_regression_and_multi_label(input_ids):
    for ours in (shared_bert.SharedBertForSequenceClassification, shared_bert.SharedGptForSequenceClassification):
        kind = "bert" if "Bert" in ours.__name__ else "gpt"
        one = tiny_model(kind, ours, num_labels=1)
        out = one(input_ids, labels=torch.tensor([0.5, 2.0]))
        expected = (out.logits.squeeze() - torch.tensor([0.5, 2.0])).square().mean()
        torch.testing.assert_close(out.loss, expected)
        several = tiny_model(kind, ours, num_labels=3)
        targets = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
        out = several(input_ids, labels=targets)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, targets)
        torch.testing.assert_close(out.loss, expected)


def num_parameters(cls, **fields):
    with torch.device("meta"):
        return cls(cls.config_class(**fields)).num_parameters()


@pytest.mark.parametrize(
    ("scheme", "count"),
    [("shared", 95_367_738), ("symmetric", 102_427_194), ("pairwise", 103_017_018), ("standard", 109_514_298)],
)
def test_the_papers_counts_of_masked_language_models(scheme, count):
    assert num_parameters(shared_bert.SharedBertForMaskedLM, attention_scheme=scheme) == count


def test_the_papers_count_of_a_classifier():
    assert num_parameters(shared_bert.SharedBertForSequenceClassification, num_labels=2) == 95_337_218


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"attention_scheme": "standard"}, 84.95),
        ({"attention_scheme": "query_free"}, 77.88),
        ({"attention_scheme": "query_free", "intermediate_size": 3456}, 84.95),
        ({"attention_scheme": "standard", "intermediate_size": 2688}, 77.88),
    ],
)
def test_the_papers_counts_of_gpt_without_embeddings(fields, millions):
    embeddings = (50304 + 1024) * 768
    count = num_parameters(shared_bert.SharedGptForCausalLM, **fields) - embeddings
    assert round(count / 1e6, 2) == millions


def test_every_class_has_its_auto_class(tmp_path):
    autos = {
        "Model": AutoModel,
        "ForMaskedLM": AutoModelForMaskedLM,
        "ForCausalLM": AutoModelForCausalLM,
        "ForSequenceClassification": AutoModelForSequenceClassification,
        "ForTokenClassification": AutoModelForTokenClassification,
        "ForQuestionAnswering": AutoModelForQuestionAnswering,
        "ForMultipleChoice": AutoModelForMultipleChoice,
    }
    for kind, prefix in (("bert", "SharedBert"), ("gpt", "SharedGpt")):
        config = tiny_config(kind)
        config.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
        for suffix, auto in autos.items():
            cls = getattr(shared_bert, prefix + suffix, None)
            if cls is not None:
                assert type(auto.from_config(config)) is cls


def test_padding_changes_nothing(kind, scheme, implementation, input_ids):
    model = tiny_model(kind, attention_scheme=scheme)
    model.set_attn_implementation(implementation)
    alone = logits(model, input_ids[:, :7])
    mask = torch.ones_like(input_ids)
    mask[:, 7:] = 0
    padded = logits(model, input_ids, attention_mask=mask)[:, :7]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_only_the_encoder_looks_ahead(kind, scheme, implementation, input_ids):
    model = tiny_model(kind, attention_scheme=scheme)
    model.set_attn_implementation(implementation)
    changed = input_ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 99
    before, after = logits(model, input_ids)[:, :8], logits(model, changed)[:, :8]
    if kind == "gpt":
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert (after - before).abs().max() > 1e-4


def test_packed_documents_are_as_if_alone(kind, scheme, implementation, input_ids):
    model = tiny_model(kind, attention_scheme=scheme)
    model.set_attn_implementation(implementation)
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [4] * 3 + [5] * 6 + [-1] * 3])
    packed = logits(model, input_ids, document_ids=document_ids)
    for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 9)):
        alone = logits(model, input_ids[row : row + 1, start:end])
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=1e-5, atol=1e-5)


def test_documents_by_position_ids_are_as_if_alone(scheme, implementation, input_ids):
    """A batch of transformers' DataCollatorWithFlattening, longer than the positions, with and without a cache."""
    lengths = [30, 7, 25]
    tokens = torch.randint(3, 99, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    model = tiny_model("gpt", attention_scheme=scheme)
    model.set_attn_implementation(implementation)
    for use_cache in (False, True):
        flattened = logits(model, tokens, position_ids=position_ids, use_cache=use_cache)
        alone = [logits(model, part) for part in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(flattened, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_a_row_of_documents_may_be_longer_than_the_positions(kind, input_ids):
    lengths = [30, 7, 25]
    tokens = torch.randint(3, 99, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    document_ids = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    model = tiny_model(kind)
    packed = logits(model, tokens, document_ids=document_ids)
    alone = [logits(model, part) for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"contains 61, but max_position_embeddings=40"):
        model(tokens, document_ids=document_ids * 0)


def test_an_encoder_takes_position_ids_as_bert_does():
    """Stock BERT sees no documents in them; rows longer than the positions are taken."""
    stock = BertForMaskedLM(BertConfig(**TINY, **NO_DROPOUT)).eval()
    model = tiny_model("bert", attention_scheme="standard")
    model.load_state_dict(stock.state_dict())
    tokens = torch.randint(3, 99, (2, 62), generator=torch.Generator().manual_seed(0))
    position_ids = (torch.arange(62) % 31).expand(2, -1)
    expected = logits(stock, tokens, position_ids=position_ids)
    torch.testing.assert_close(logits(model, tokens, position_ids=position_ids), expected, rtol=1e-5, atol=1e-5)


def test_positions_beyond_the_embeddings_are_refused(kind, input_ids):
    with pytest.raises(ValueError, match=r"contains 40, but max_position_embeddings=40"):
        tiny_model(kind)(input_ids, position_ids=torch.arange(29, 41)[None])
    with pytest.raises(ValueError, match=r"contains -1, but max_position_embeddings=40"):
        tiny_model(kind)(input_ids, position_ids=torch.arange(-1, 11)[None])


def test_flash_attention_is_given_the_documents(kind, input_ids):
    """No flash kernel runs on a CPU: what it would be told is checked instead."""
    from shared_bert.modeling.documents import attention_inputs

    config = tiny_config(kind)
    config._attn_implementation = "flash_attention_2"
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [1] * 3 + [2] * 6 + [-1] * 3])
    mask, told = attention_inputs(config, kind == "gpt", torch.zeros(2, 12, 32), document_ids=document_ids)
    assert mask is None
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 5, 12, 15, 21, 24]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_q"] == told["max_length_k"] == 12


def test_flash_attention_is_given_the_positions(input_ids):
    """From which it reads the documents of a padding-free batch, as in stock models."""
    from shared_bert.modeling.documents import attention_inputs

    config = tiny_config("gpt")
    config._attn_implementation = "flash_attention_2"
    position_ids = torch.arange(12)[None] % 5
    mask, told = attention_inputs(config, True, torch.zeros(1, 12, 32), position_ids=position_ids)
    assert mask is None
    assert told == {"position_ids": position_ids}


def test_document_ids_go_with_no_mask(kind, input_ids):
    with pytest.raises(ValueError, match="leave out attention_mask"):
        tiny_model(kind)(input_ids, document_ids=input_ids * 0, attention_mask=input_ids * 0 + 1)


def test_more_tokens_than_positions_are_refused(kind):
    with pytest.raises(ValueError, match=r"41 tokens.*max_position_embeddings=40"):
        tiny_model(kind)(torch.ones(1, 41, dtype=torch.long))


def test_exactly_one_input(kind, input_ids):
    model = tiny_model(kind)
    embeds = model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(logits(model, inputs_embeds=embeds), logits(model, input_ids))
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**inputs)


def test_hidden_states_and_attentions_are_recorded(kind, scheme, input_ids):
    model = tiny_model(kind, attention_scheme=scheme)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 12, 32)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 12, 12)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 12))


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(kind, scheme, input_ids):
    model = tiny_model(kind, attention_scheme=scheme).train()
    inputs = {"input_ids": input_ids, "labels": input_ids, "document_ids": input_ids * 0}
    plain = gradients(model, **inputs)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    again = gradients(model, **inputs)
    assert plain.keys() == again.keys() == {name for name, _ in model.named_parameters()}
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "packed"), [("standard", False), ("pairwise", True), ("shared", True), ("query_free", False)]
)
def test_compiles_without_graph_breaks(kind, scheme, packed, input_ids):
    model = tiny_model(kind, attention_scheme=scheme).train()
    labels = input_ids.masked_fill(input_ids % 3 > 0, -100)
    inputs = {"input_ids": input_ids, "labels": labels}
    if packed:
        inputs["document_ids"] = (torch.arange(12) // 5).expand(2, 12)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for static in [{}, {"num_predictions": 16}] if kind == "bert" else [{}]:
        expected, got = gradients(model, **inputs, **static), gradients(compiled, **inputs, **static)
        for name in expected:
            torch.testing.assert_close(got[f"_orig_mod.{name}"], expected[name], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_saved_models_load_bit_by_bit(kind, scheme, input_ids, tmp_path):
    model = tiny_model(kind, attention_scheme=scheme)
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    again = auto.from_pretrained(tmp_path)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for model_loaded in (loaded.eval(), again.eval()):
        for name, tensor in model_loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        torch.testing.assert_close(logits(model_loaded, input_ids), logits(model, input_ids))
    assert json.loads((tmp_path / "config.json").read_text())["attention_scheme"] == scheme


def test_tied_weights_are_saved_once(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
    assert sum(tensor.shape == (99, 32) for tensor in saved) == 1


def test_a_stock_folder_is_not_taken_for_ours(tmp_path):
    """The scheme ``standard`` has other names inside attention: loading says which weights it did not find."""
    BertForMaskedLM(stock_config("bert")).save_pretrained(tmp_path)
    _, info = shared_bert.SharedBertForMaskedLM.from_pretrained(
        tmp_path, config=tiny_config("bert", attention_scheme="standard"), output_loading_info=True
    )
    assert "bert.encoder.layer.0.attention.self.projection.weight" in info["missing_keys"]


def test_residual_matrices_of_gpt_start_smaller():
    torch.manual_seed(0)
    model = shared_bert.SharedGptModel(tiny_config("gpt", hidden_size=256, num_hidden_layers=8))
    assert model.h[0].attn.projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for matrix in (model.h[3].attn.output.weight, model.h[3].mlp.c_proj.weight):
        assert matrix.std().item() == pytest.approx(0.02 / 4, rel=0.1)


def test_vocabulary_can_be_resized(kind, input_ids):
    model = tiny_model(kind)
    before = logits(model, input_ids)
    model.resize_token_embeddings(105)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    after = logits(model, input_ids)
    assert after.shape[-1] == 105
    torch.testing.assert_close(after[..., :99], before)
