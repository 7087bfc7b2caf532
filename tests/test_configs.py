"""Every YAML file in configs/ says only what is understood, and builds what it describes."""

from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from shared_bert.data.images import Images
from shared_bert.data.tasks import GLUE
from shared_bert.evaluation.classification import GlueArguments, TaskArguments
from shared_bert.evaluation.image_classification import ImageArguments, ImageTrainingArguments
from shared_bert.evaluation.squad import SquadArguments
from shared_bert.training import FinetuningArguments, ModelArguments, parse_recipe
from shared_bert.training.models import config_fields, make_model, pretraining_objective
from shared_bert.training.recipe import parse_arguments
from shared_bert.training.yaml_files import load_mapping

CONFIGS = Path(__file__).parents[1] / "configs"


def files(folder):
    paths = sorted((CONFIGS / folder).glob("*.yaml"))
    assert paths
    return [pytest.param(path, id=path.stem) for path in paths]


def build(model_args):
    config = AutoConfig.for_model(**config_fields(model_args))
    with torch.device("meta"):
        return make_model(config)


@pytest.mark.parametrize("path", files("models"))
def test_models_build(path):
    if pretraining_objective(load_mapping(path)["model_type"]):
        build(ModelArguments(config_name=str(path), tokenizer_vocab_size=1000))
    else:
        images = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
        ImageArguments(images="any", config_name=str(path)).make_model(images)


@pytest.mark.parametrize("path", files("pretrain"))
def test_pretraining_recipes_parse_and_build(path):
    model_args, data_args, training_args = parse_recipe([str(path), "--use_cpu"])
    if first := model_args.model_name_or_path:  # of another recipe
        model_args, _, _ = parse_recipe([str(path.with_stem(Path(first).name)), "--use_cpu"])
    assert data_args.block_size <= build(model_args).config.max_position_embeddings
    assert training_args.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", files("finetune"))
def test_finetuning_recipes_parse(path):
    arguments = [str(path), "--model", "any", "--use_cpu"]
    files = ["--train_file", "a.parquet", "--validation_file", "b.parquet"]
    other_kinds = {"squad": SquadArguments, **dict.fromkeys(("text", "tokens", "choice"), TaskArguments)}
    if of_kind := other_kinds.get(load_mapping(path).get("kind")):
        _, training_args = parse_arguments([*arguments, *files], (of_kind, FinetuningArguments))
    else:
        glue_args, training_args = parse_arguments(arguments, (GlueArguments, FinetuningArguments))
        assert glue_args.task_names == list(GLUE)
    assert training_args.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", files("images"))
def test_image_recipes_parse(path):
    arguments = [str(path), "--images", "any", "--use_cpu"]
    image_args, training_args = parse_arguments(arguments, (ImageArguments, ImageTrainingArguments))
    assert (CONFIGS.parent / image_args.config_name).is_file()
    assert training_args.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", files("accelerate"))
def test_accelerate_files_load(path):
    config = load_config_from_file(str(path))
    processes = {"one_gpu": 1, "ddp_4xh100": 4, "ddp_2x8xh100": 16, "fsdp2_8xh100": 8, "ddp_2cpu": 2, "fsdp2_2cpu": 2}
    assert config.num_processes == processes[path.stem]
    assert (config.distributed_type == DistributedType.FSDP) == path.stem.startswith("fsdp2")
    assert config.use_cpu == path.stem.endswith("cpu")


@pytest.mark.parametrize(
    ("recipe", "devices", "tokens"),
    [
        ("shared_bert_base", 4, 132 * 4 * 512),
        ("pairwise_bert_base", 4, 256 * 512),
        ("pairwise_bert_small", 4, 256 * 512),
        ("gpt_small_standard", 4, 491_520),
        ("gpt_small_query_free", 4, 491_520),
        ("gpt_small_query_free_wide", 4, 491_520),
        ("masa_gpt_small", 4, 491_520),
    ],
)
def test_tokens_per_step_are_the_papers(recipe, devices, tokens):
    _, data, training = parse_recipe([str(CONFIGS / "pretrain" / f"{recipe}.yaml"), "--use_cpu"])
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
    assert rows * data.block_size == tokens


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [("gpt_small_standard", 84.95), ("gpt_small_query_free", 77.88), ("gpt_small_query_free_wide", 84.95)],
)
def test_gpt_small_has_the_papers_parameters(recipe, millions):
    model = build(parse_recipe([str(CONFIGS / "pretrain" / f"{recipe}.yaml"), "--use_cpu"])[0])
    parameters = sum(p.numel() for name, p in model.named_parameters() if "wte" not in name and "wpe" not in name)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.006)


def test_shared_bert_base_has_the_papers_parameters():
    model = build(parse_recipe([str(CONFIGS / "pretrain" / "shared_bert_base.yaml"), "--use_cpu"])[0])
    assert model.num_parameters() == 95_367_738


def test_masa_reads_the_papers_tokens_per_parameter():
    model_args, _, training = parse_recipe([str(CONFIGS / "pretrain" / "masa_gpt_small.yaml"), "--use_cpu"])
    assert 491_520 * training.max_steps / build(model_args).num_parameters() == pytest.approx(20, rel=0.01)
