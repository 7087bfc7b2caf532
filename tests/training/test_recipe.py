"""Recipes and the command line: what they accept, and what they refuse by name."""

import pytest
import yaml

from shared_bert.training import parse_recipe
from shared_bert.training.arguments import read_overrides
from shared_bert.training.models import config_fields

from .runs import recipe, write_recipe


def parse(tmp_path, *options, **changes):
    return parse_recipe([str(write_recipe(tmp_path, **changes)), *options])


def test_options_override_the_recipe(tmp_path):
    model, data, training = parse(
        tmp_path,
        "--learning_rate",
        "3e-4",
        "--block-size",
        "16",
        "--config_overrides",
        "hidden_size=64,hidden_act=relu",
    )
    assert training.learning_rate == 3e-4
    assert data.block_size == 16
    assert (model.config_overrides["hidden_size"], model.config_overrides["hidden_act"]) == (64, "relu")
    assert model.config_overrides["num_hidden_layers"] == 2  # the recipe's own stay


def test_an_option_replaces_what_it_would_contradict(tmp_path):
    assert parse(tmp_path, "--dataset-name", "python-docs")[1].train_file is None
    model, _, _ = parse(tmp_path, "--model_name_or_path=somewhere")
    assert (model.model_type, model.tokenizer_vocab_size, model.config_overrides) == (None, None, {})
    model, _, _ = parse(tmp_path, "--tokenizer_name", "somewhere")
    assert (model.tokenizer_name, model.tokenizer_vocab_size) == ("somewhere", None)


@pytest.mark.parametrize("value", ["1e-4", 1e-4, "0.0001"])
def test_exponents_are_numbers(tmp_path, value):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("learning_rate: 0.001", f"learning_rate: {value!r}"))
    assert parse_recipe([str(path)])[2].learning_rate == 1e-4


def test_an_unquoted_exponent_is_a_number_in_a_mapping_too(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + "lr_scheduler_kwargs: {min_lr: 6e-5}\n")
    assert parse_recipe([str(path)])[2].lr_scheduler_kwargs == {"min_lr": 6e-5}


def test_everything_can_stand_on_the_command_line(tmp_path):
    options = "--model_type shared_gpt --tokenizer_vocab_size 300 --dataset_name python-docs --no_separate_documents"
    _, data, training = parse_recipe([*options.split(), "--use_cpu", "--output_dir", str(tmp_path)])
    assert not data.separate_documents
    assert training.use_cpu


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ([], {"learning_rat": 1}, "'learning_rat'.*'learning_rate'"),
        (["--blok_size", "3"], {}, "'blok_size'.*'block_size'"),
        (["--block-siz=3"], {}, "'block_siz'.*'block_size'"),
        (["stray"], {}, "'stray'"),
        ([], {"max_steps": "many"}, "max_steps.*'many'"),
        ([], {"max_steps": 2.5}, "max_steps.*'2.5'"),
        (["--bf16", "perhaps"], {}, "bf16.*perhaps"),
        (["--config_overrides", "hidden_size"], {}, "'hidden_size' has no value"),
        (["--config_overrides", "rank=[1,2"], {}, "'rank=.1,2' is not of the form"),
        ([], {"output_dir": None}, "output_dir"),
        ([], {"model_type": None}, "config_name"),
        ([], {"tokenizer_vocab_size": None}, "tokenizer_name"),
        ([], {"tokenizer_name": "bert"}, "tokenizer_name='bert'.*tokenizer_vocab_size=320"),
        ([], {"model_name_or_path": "bert"}, "model_name_or_path='bert'"),
        (
            [],
            {"model_name_or_path": "bert", "model_type": None, "config_overrides": None},
            "a trained one has its own tokenizer",
        ),
        (["--model_name_or_path", "bert", "--sharing", "rank=2"], {}, "sharing is for a new model"),
        ([], {"config_name": "missing.yaml"}, "config_name='missing.yaml'"),
        ([], {"mlm_probability": 15}, "mlm_probability=15"),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "true"], {}, "overwrite_output_dir"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *options, **changes)


def test_a_recipe_that_is_no_mapping_is_named(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    for name, message in (("list.yaml", "list.yaml must hold keys"), ("absent.yaml", "absent.yaml cannot be read")):
        with pytest.raises(ValueError, match=message):
            parse_recipe([str(tmp_path / name)])


def test_config_name_is_found_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "model.yaml").write_text("{model_type: shared_gpt, hidden_size: 48}")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe(tmp_path), "model_type": None, "config_name": "model.yaml", "config_overrides": None})
    )
    model_args = parse_recipe([str(folder / "recipe.yaml")])[0]
    assert config_fields(model_args) == {"model_type": "shared_gpt", "hidden_size": 48}
    (tmp_path / "model.yaml").write_text("{model_type: shared_gpt, hidden_size: 64}")
    model_args = parse_recipe([str(folder / "recipe.yaml")])[0]
    assert config_fields(model_args)["hidden_size"] == 64


def test_bad_config_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config_overrides.*'hiden_size'.*'hidden_size'"):
        config_fields(parse(tmp_path, "--config_overrides", "hiden_size=3")[0])
    (tmp_path / "model.yaml").write_text("{model_type: shared_bert, num_layers: 2}")
    with pytest.raises(ValueError, match=r"model\.yaml.*'num_layers'.*'num_hidden_layers'"):
        config_fields(parse(tmp_path, config_name=str(tmp_path / "model.yaml"))[0])
    with pytest.raises(ValueError, match=r"'shared_gpt'.*shared_bert"):
        config_fields(parse(tmp_path, config_name=str(tmp_path / "model.yaml"), model_type="shared_gpt")[0])
    with pytest.raises(ValueError, match="model_type='vit'"):
        config_fields(parse(tmp_path, model_type="vit")[0])


def test_overrides_are_read_as_yaml():
    found = read_overrides("rank=null, lr = 1e-3,layer_ranks=[[1,2],[3,4]],hidden_act=gelu_new,align=false")
    assert found == {
        "rank": None, "lr": 1e-3, "layer_ranks": [[1, 2], [3, 4]], "hidden_act": "gelu_new", "align": False,
    }  # fmt: skip
    assert read_overrides("") == {}
