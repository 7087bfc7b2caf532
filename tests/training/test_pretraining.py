"""Whole runs in this process: what is trained, logged and saved, and what is refused before."""

import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerState,
)

from shared_bert import SharedBertConfig, SharedBertForMaskedLM, SharedBertForSequenceClassification
from shared_bert.training import DataArguments, ModelArguments, PretrainingArguments, pretrain
from shared_bert.training.checkpoints import UNFINISHED
from shared_bert.training.run_record import RunRecorder
from shared_bert.training.trainer import PretrainingTrainer, SafeTrainer

from ..conftest import tiny_model
from .runs import MASA, SHAPE, recipe


def run_here(folder, **changes):
    keys = recipe(folder, **changes)
    arguments = []
    for dataclass in (ModelArguments, DataArguments, PretrainingArguments):
        own = {name: keys.pop(name) for name in list(keys) if name in dataclass.__dataclass_fields__}
        arguments.append(dataclass(**own))
    assert not keys
    return pretrain(*arguments)


@pytest.mark.parametrize(
    ("model_type", "auto_class"), [("shared_bert", AutoModelForMaskedLM), ("shared_gpt", AutoModelForCausalLM)]
)
def test_a_run_learns_and_saves(tmp_path, capsys, model_type, auto_class):
    metrics = run_here(
        tmp_path, model_type=model_type, max_steps=60, learning_rate=1e-2, eval_strategy="steps", eval_steps=30
    )
    output_dir = tmp_path / "run"

    curve = json.loads((output_dir / "loss_curve.json").read_text())
    assert len(curve["train"]) == 60
    assert curve["evaluation"][-1]["loss"] == metrics["eval_loss"] < curve["unigram_entropy"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert 0.2 < metrics["eval_accuracy"] <= 1
    for name in ("loss_curve.png", "train_results.json", "eval_results.json", "trainer_state.json"):
        assert (output_dir / name).stat().st_size
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"][0]
    assert log["tokens_per_second"] > 0
    assert log["mfu"] > 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "unigram entropy" in printed

    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    model = auto_class.from_pretrained(output_dir)
    assert model.config.vocab_size % 64 == 0
    assert 0 <= model.config.vocab_size - len(tokenizer) < 64
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model(**tokenizer("the fox hunts", return_tensors="pt")).logits.shape[-1] == model.config.vocab_size
    # Trainer states it in every config; it is a field of decoders alone.
    assert getattr(model.config, "use_cache", None) == {"shared_bert": None, "shared_gpt": True}[model_type]


@pytest.mark.parametrize(
    ("model_type", "sharing", "kept"),
    [
        ("llama", {"depth_sharing": "masa", "num_atoms": 1}, {"depth_sharing": "masa", "num_atoms": 1}),
        ("bert", "attention_scheme=shared", {"attention_scheme": "shared"}),
        ("bert", None, None),
    ],
)
def test_an_architecture_of_transformers_learns_and_shares(tmp_path, capsys, model_type, sharing, kept):
    fields = {**SHAPE, "num_key_value_heads": 2} if model_type == "llama" else SHAPE
    options = {"model_type": model_type, "config_overrides": fields, "sharing": sharing, "separate_documents": False}
    metrics = run_here(tmp_path, **options, max_steps=60, learning_rate=1e-2)
    curve = json.loads((tmp_path / "run" / "loss_curve.json").read_text())
    assert metrics["eval_loss"] < curve["unigram_entropy"]
    cls = LlamaForCausalLM if model_type == "llama" else BertForMaskedLM
    model, info = cls.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"]
    record = getattr(model.config, "quantization_config", None)
    assert (record is None) == (kept is None)
    for name, value in (kept or {}).items():
        assert getattr(record, name) == value
    assert (kept or {"attention_scheme": "stock"}).get("attention_scheme", "standard") in capsys.readouterr().out


def test_a_trained_model_goes_on(tmp_path):
    run_here(tmp_path, max_steps=40, learning_rate=1e-2)
    first = json.loads((tmp_path / "run" / "loss_curve.json").read_text())["train"]
    trained = {"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "second")}
    unset = {"model_type": None, "config_overrides": None, "tokenizer_vocab_size": None}
    second = run_here(tmp_path, max_steps=1, **trained, **unset)
    assert second["train_loss"] < first[0]["loss"] - 0.5


def test_a_run_is_overwritten_only_when_asked(tmp_path):
    run_here(tmp_path, max_steps=1)
    (tmp_path / "run" / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="holds another run"):
        run_here(tmp_path)
    run_here(tmp_path, max_steps=2, overwrite_output_dir=True)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_streaming_goes_round_a_short_text(tmp_path):
    metrics = run_here(tmp_path, streaming=True, max_steps=30, per_device_train_batch_size=32)
    assert metrics["epoch"] == 1.0
    assert "eval_perplexity" in metrics
    assert json.loads((tmp_path / "run" / "loss_curve.json").read_text())["unigram_entropy"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True, "max_steps": -1}, "streaming.*max_steps=-1"),
        ({"streaming": True, "dataloader_num_workers": 2}, "dataloader_num_workers=2"),
        ({"block_size": 33}, "block_size=33.*max_position_embeddings=32"),
        ({"config_overrides": {**SHAPE, "vocab_size": 200}}, "tokenizer_vocab_size=320.*200"),
        ({"resume_from_checkpoint": "true"}, "no whole checkpoint"),
        ({"model_type": "bert"}, "a bert attends across the documents.*separate_documents=false"),
        ({"sharing": "depth_sharing=masa"}, "sharing is for a model of transformers: a shared_bert has config fields"),
        ({"model_type": "bert", "separate_documents": False, "sharing": {"depth_sharing": "masa"}}, "needs num_atoms"),
    ],
)
def test_bad_arguments_cost_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_here(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("the fox hunts .\nthe dog barks .", "do not fill one block of 32")]
)
def test_text_that_is_no_use_replaces_nothing(tmp_path, text, message):
    run_here(tmp_path, max_steps=1)
    (tmp_path / "other.txt").write_text(text)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        run_here(tmp_path, train_file=str(tmp_path / "other.txt"), validation_split=0.5, overwrite_output_dir=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_stream_that_is_no_use_replaces_nothing(tmp_path):
    run_here(tmp_path, max_steps=1)
    (tmp_path / "other.txt").write_text("the fox hunts .\nthe dog barks .\nthe owl sees .")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"train text: the corpus has .* do not fill one block of 32"):
        run_here(
            tmp_path, train_file=str(tmp_path / "other.txt"), validation_file=str(tmp_path / "text.txt"),
            streaming=True, overwrite_output_dir=True,
        )  # fmt: skip
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_run_replaces_nothing(tmp_path):
    run_here(tmp_path, max_steps=1)
    run_here(tmp_path, max_steps=1, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"other.*holds another run"):
        run_here(
            tmp_path, output_dir=str(tmp_path / "other"), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )


def test_a_trained_model_of_another_kind_is_refused(tmp_path):
    run_here(tmp_path, max_steps=1)
    tiny_model("bert", SharedBertForSequenceClassification, vocab_size=320).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"classifier.*missing keys cls.predictions"):
        run_here(
            tmp_path, model_name_or_path=str(tmp_path / "classifier"), tokenizer_name=str(tmp_path / "run"),
            model_type=None, tokenizer_vocab_size=None, config_overrides=None, output_dir=str(tmp_path / "second"),
        )  # fmt: skip


@pytest.mark.parametrize("option", ["remove_unused_columns", "dataloader_persistent_workers"])
def test_options_that_would_break_batches_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=option):
        run_here(tmp_path, **{option: True})


def test_a_tokenizer_too_large_is_refused(tmp_path):
    run_here(tmp_path, max_steps=1)
    size = len(AutoTokenizer.from_pretrained(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"tokenizer has {size} tokens.*vocab_size=64"):
        run_here(
            tmp_path,
            tokenizer_vocab_size=None,
            tokenizer_name=str(tmp_path / "run"),
            config_overrides={**SHAPE, "vocab_size": 64},
            output_dir=str(tmp_path / "other"),
        )


@pytest.mark.parametrize("source", ["direct", "network"])
def test_decay_spares_diagonals_biases_norms_and_coefficients(tmp_path, monkeypatch, source):
    groups = {}

    class Groups(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                groups[group["weight_decay"]] = {names[id(parameter)]: parameter for parameter in group["params"]}

    plain_init = PretrainingTrainer.__init__
    monkeypatch.setattr(
        PretrainingTrainer, "__init__", lambda self, **kwargs: plain_init(self, callbacks=[Groups()], **kwargs)
    )
    run_here(tmp_path, max_steps=1, weight_decay=0.1, config_overrides=MASA | {"coefficient_source": source})
    assert all(parameter.ndim >= 2 for parameter in groups[0.1].values())
    assert any(name.endswith("atoms") for name in groups[0.1])
    spared = {name: parameter for name, parameter in groups[0.0].items() if "coefficients" not in name}
    assert all(parameter.ndim == 1 for parameter in spared.values())
    assert any("diagonal" in name for name in spared)
    assert len(groups[0.0]) - len(spared) == 2 * (1 if source == "direct" else 7)


def test_checkpoints_rotate_and_the_best_is_loaded(tmp_path):
    run_here(
        tmp_path, save_steps=2, eval_steps=2, eval_strategy="steps", save_total_limit=2, load_best_model_at_end=True,
        learning_rate=0.02, lr_scheduler_type="constant",
    )  # fmt: skip
    output_dir = tmp_path / "run"
    state = json.loads((output_dir / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == output_dir
    assert best.is_dir()
    folders = sorted(path.name for path in output_dir.iterdir() if path.is_dir())
    assert folders == sorted({best.name, "checkpoint-10", *folders[:2]})
    assert len(folders) == 2
    inner = json.loads((best / "trainer_state.json").read_text())
    assert inner["best_model_checkpoint"] == str(best)
    saved = AutoModelForMaskedLM.from_pretrained(output_dir).state_dict()
    for name, tensor in AutoModelForMaskedLM.from_pretrained(best).state_dict().items():
        assert torch.equal(saved[name], tensor)


@pytest.mark.parametrize("model_type", ["shared_bert", "shared_gpt"])
def test_a_finished_model_has_coefficients_and_no_network(tmp_path, model_type):
    output_dir = tmp_path / "run"
    changes = {"model_type": model_type, "config_overrides": MASA | {"coefficient_source": "network"}}
    auto_class = AutoModelForMaskedLM if model_type == "shared_bert" else AutoModelForCausalLM
    input_ids = torch.arange(3, 19).view(2, 8)

    def check():
        checkpoint = auto_class.from_pretrained(output_dir / "checkpoint-10").eval()
        final, info = auto_class.from_pretrained(output_dir, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (checkpoint.config.coefficient_source, final.config.coefficient_source) == ("network", "direct")
        assert final.config.architectures == checkpoint.config.architectures
        with torch.no_grad():
            torch.testing.assert_close(final.eval()(input_ids).logits, checkpoint(input_ids).logits)
        folders = {path.name for path in output_dir.iterdir() if path.is_dir()}
        assert folders == {"checkpoint-5", "checkpoint-10"}

    run_here(tmp_path, **changes)
    check()
    shutil.rmtree(output_dir / "checkpoint-10")
    run_here(tmp_path, resume_from_checkpoint="true", **changes)
    check()
    # Killed while it saved its end: nothing is left to train, and what was half written is no checkpoint.
    (output_dir / UNFINISHED / "checkpoint-9").mkdir(parents=True)
    run_here(tmp_path, resume_from_checkpoint="true", **changes)
    check()


def test_a_subclass_is_saved_with_fixed_coefficients(tmp_path, monkeypatch):
    code = "from shared_bert import SharedBertForMaskedLM\n\nclass OwnModel(SharedBertForMaskedLM):\n    pass\n"
    (tmp_path / "own_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own_class = importlib.import_module("own_model").OwnModel
    config = SharedBertConfig(**MASA, vocab_size=64, attention_scheme="standard", coefficient_source="network")
    rows = [{"input_ids": torch.arange(5, 13), "labels": torch.arange(5, 13)}] * 2
    args = PretrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SafeTrainer(model=own_class(config), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    saved, input_ids = own_class.from_pretrained(tmp_path / "run").eval(), rows[0]["input_ids"][None]
    assert saved.config.coefficient_source == "direct"
    torch.testing.assert_close(saved(input_ids).logits, trainer.model.eval()(input_ids).logits)


class OutOfMemory(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("save_only_model", [False, True])
def test_an_error_beside_a_checkpoint_leaves_it(tmp_path, monkeypatch, save_only_model):
    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, OutOfMemory()]
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", callbacks)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        run_here(tmp_path, max_steps=4, save_steps=1, save_only_model=save_only_model)
    assert SharedBertForMaskedLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


def test_tokens_per_step_count_every_gpu_of_the_process(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=3, use_cpu=True)
    args._n_gpu = 4  # as `nn.DataParallel` takes them
    state = TrainerState(is_world_process_zero=True)
    RunRecorder("pre-training", {}, block_size=8).on_train_begin(args, state, None)
    assert json.loads((tmp_path / "run.json").read_text())["tokens_per_step"] == 3 * 4 * 8
