"""Healing: distilling a converted model from the original.

The student is trained on plain text to reproduce the teacher's hidden states after every layer and, if it has a
vocabulary head, the teacher's predictions. No labels are needed, so any text will do.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..conversion.families import FAMILIES, SHARED_CLASSES, STOCK_CLASSES, family_of
from ..conversion.stock import read_stock
from ..data import collate_blocks
from ..data.packing import PADDING
from ..injection import SharingConfig
from .arguments import DataArguments, PretrainingArguments
from .models import check_length, check_vocabulary
from .run import run_training, starting_checkpoint
from .text import block_datasets, check_streaming, describe_text, pack_documents, read_documents
from .trainer import TimedTrainer, uses_fsdp


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    training_args: PretrainingArguments,
    save_more: Callable[[Path], None] | None = None,
) -> dict[str, float]:
    """Distil a converted model from the original (see `HealingTrainer`), and save it with its tokenizer.

    `output_dir` gets the same files as from `pretrain`. A pooler, and a head that is not over the vocabulary, are not
    trained: they read hidden states, which come closer to the teacher's.

    Args:
        model: the student: one of the classes of `STOCK_CLASSES`, or a stock model that shares (see `share`) and
            reads text.
        teacher: the original: stock, or of this package. It is not changed.
        tokenizer: of both.
        data_args: the text; its fields about masks are ignored, since nothing is masked.
        save_more: see `SafeTrainer`.

    Returns:
        The metrics of training and of the final evaluation.

    Raises:
        ValueError: models that do not match, or invalid arguments; before any training.
        FileNotFoundError: missing text.
        FloatingPointError: training diverged; names the step, the learning rate and the last good checkpoint.
        OSError: a full disk; names the last good checkpoint.
    """
    if type(model) in STOCK_CLASSES and type(teacher) in SHARED_CLASSES:
        teacher = read_stock(teacher)
    checkpoint = starting_checkpoint(training_args)
    _check_pair(model, teacher)
    check_healing(teacher, tokenizer, data_args, training_args)
    with training_args.main_process_first(local=False, desc="reading and packing the text"):
        blocks = pack_documents(read_documents(data_args, training_args.seed), tokenizer, data_args)

    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # a classifier finds the ends of texts by it
    unused = _parameters_without_gradient(model)
    for parameter in unused:
        parameter.requires_grad_(False)
    set_seed(training_args.seed)
    trainer = HealingTrainer(
        model=model,
        teacher=teacher,
        args=training_args,
        data_collator=collate_blocks,
        processing_class=tokenizer,
        save_more=save_more,
        **block_datasets(blocks),
    )
    predicts_tokens = _predicts_tokens(model)
    loss_name = "error of states + KL divergence (nats)" if predicts_tokens else "error of states"
    text = describe_text(data_args)
    metrics = run_training(trainer, checkpoint, "healing", text, data_args.block_size, loss_name=loss_name)
    for parameter in unused:
        parameter.requires_grad_(True)
    if trainer.is_world_process_zero():
        print(f"healed to a loss of {metrics['eval_loss']:.4f}; the model is in {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def _check_pair(model: PreTrainedModel, teacher: PreTrainedModel):
    shares = isinstance(getattr(model.config, "quantization_config", None), SharingConfig)
    if type(model) not in STOCK_CLASSES and not shares:
        names = ", ".join(cls.__name__ for cls in STOCK_CLASSES)
        raise ValueError(f"{type(model).__name__} cannot be healed: give one of {names}, or a stock model that shares")
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} cannot be healed: it does not read plain text")
    if type(teacher) is not type(model):
        raise ValueError(f"a {type(teacher).__name__} cannot teach a {type(model).__name__}: their heads must agree")
    for field in ("hidden_size", "num_hidden_layers", "vocab_size"):
        mine, theirs = (getattr(side.config.get_text_config(), field) for side in (model, teacher))
        if mine != theirs:
            raise ValueError(f"the model has {field}={mine} and its teacher {theirs}: they must agree")
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}: train it in float32 (bf16=true computes in bfloat16)")


def check_healing(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    training_args: PretrainingArguments,
):
    """Raise the ValueError of `heal` for invalid arguments, before any text is read."""
    check_vocabulary(teacher.config, tokenizer)
    if (data_args.dataset_name is None) == (data_args.train_file is None):
        raise ValueError("healing needs text: give exactly one of dataset_name and train_file")
    check_length(teacher.config, "block_size", data_args.block_size)
    check_streaming(data_args, training_args)
    if uses_fsdp(training_args) and teacher.base_model is teacher:
        # FSDP2 renames the class of the outermost module, by whose name transformers finds the hidden states.
        raise ValueError(f"a {type(teacher).__name__} without a head cannot be healed under FSDP: use DDP")
    if training_args.gradient_checkpointing:
        raise ValueError(
            "activation checkpointing has no effect in eval mode, in which healing runs (without dropout): omit "
            "activation_checkpointing (gradient_checkpointing, in older releases of transformers)"
        )


class HealingTrainer(TimedTrainer):
    """`TimedTrainer` that distils a teacher into its converted model; the loss is `healing_loss`.

    The student is trained in eval mode, too: its targets are computed without dropout.

    Args:
        teacher: a model of the student's class, layers and hidden size.
    """

    loss_is_scaled_for_ga = False  # the loss is the mean of one batch; Trainer averages accumulated ones

    def __init__(self, *args, teacher: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predicts_tokens = _predicts_tokens(self.model)
        teacher = self.teacher if predicts_tokens else self.teacher.base_model
        options = {"output_hidden_states": True}
        if self.model.config.model_type in FAMILIES:
            options["document_ids"] = inputs["document_ids"]
        else:  # stock models attend across the documents of a row, teacher and student alike
            options["attention_mask"] = (inputs["document_ids"] != PADDING).long()
        if "use_cache" in self.model.config.__dataclass_fields__:
            options["use_cache"] = False
        with torch.no_grad(), self.accelerator.autocast():
            expected = teacher(inputs["input_ids"], **options)
        input_ids = inputs["input_ids"]
        if _reads_choices(self.model):
            input_ids = input_ids.unsqueeze(1)  # one choice each
        outputs = model.eval()(input_ids, **options)
        is_text = inputs["document_ids"] != PADDING
        loss = healing_loss(outputs, expected, is_text, predicts_tokens)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None


def _predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether the model's logits are over the vocabulary."""
    if model.config.model_type in FAMILIES:
        return family_of(model.config).is_language_model(model)
    return model.get_output_embeddings() is not None


def _reads_choices(model: PreTrainedModel) -> bool:
    """Whether the model reads several texts per row, [batch, choices, seq]."""
    return type(model).__name__.endswith("ForMultipleChoice")


def _parameters_without_gradient(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters that the loss does not depend on: a pooler, and a head that is not over the vocabulary."""
    if _predicts_tokens(model):
        return []
    used = {id(p) for name, p in model.base_model.named_parameters() if not name.startswith("pooler.")}
    return [parameter for parameter in model.parameters() if id(parameter) not in used]


def healing_loss(student, teacher, is_text: torch.Tensor, predicts_tokens: bool) -> torch.Tensor:
    """Return the distance of a student's outputs from its teacher's.

    It is the mean over the layers of ‖student - teacher‖² / ‖teacher‖² of their hidden states, embeddings excluded;
    if a model `predicts_tokens`, plus the mean KL divergence from the teacher's to the student's predictions in nats.

    Args:
        student, teacher: outputs with `hidden_states` (the embeddings first) and, if needed, `logits`.
        is_text: bool [batch, seq], False at padding, which is ignored.
    """
    errors = []
    for found, expected in zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True):
        found, expected = found[is_text].float(), expected[is_text].float()
        errors.append((found - expected).square().sum() / expected.square().sum())
    loss = torch.stack(errors).mean()
    if predicts_tokens:
        found, expected = (outputs.logits[is_text].float().log_softmax(-1) for outputs in (student, teacher))
        loss = loss + torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean")
    return loss
