"""Image classifiers are trained from scratch on any images, with and without sharing."""

import gzip
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import shared_bert  # noqa: F401 - loads what shares
from shared_bert.data.images import ImageCollator, load_images

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_images.py"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 4}
MASA = ("--depth_sharing", "masa", "--num_atoms", "2")


def bars(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of a bar that lies or stands."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, number).astype(np.uint8)
    images = generator.integers(0, 60, (number, 8, 8)).astype(np.uint8)
    for image, label, place in zip(images, labels, generator.integers(1, 7, number), strict=True):
        image[(place, slice(None)) if label else (slice(None), place)] = 255
    return images, labels


def write_idx(path: Path, values: np.ndarray):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with the files of MNIST."""
    folder = tmp_path_factory.mktemp("data") / "bars"
    folder.mkdir()
    for name, number, seed in (("train", 256, 0), ("t10k", 64, 1)):
        images, labels = bars(number, seed)
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "vit.yaml"
    path.write_text(json.dumps({"model_type": "vit", **SHAPE}))
    return path


@pytest.fixture
def train(mnist, config, tmp_path, capsys):
    def train(*options, folder="run") -> tuple[int, str]:
        main = runpy.run_path(str(SCRIPT))["main"]
        arguments = {
            "--images": mnist,
            "--config_name": config,
            "--output_dir": tmp_path / folder,
            "--use_cpu": "true",
        }
        arguments |= {"--num_train_epochs": 8, "--per_device_train_batch_size": 32, "--learning_rate": 3e-3}
        arguments |= {"--disable_tqdm": "true"} | dict(zip(options[::2], options[1::2], strict=True))
        status = main([str(word) for pair in arguments.items() for word in pair])
        captured = capsys.readouterr()
        return status, captured.err if status else captured.out

    return train


@pytest.mark.parametrize("options", [(), MASA], ids=["standard", "masa"])
def test_it_learns_and_resumes_seed_by_seed(train, tmp_path, options):
    status, printed = train(*options, "--seeds", "0")
    assert status == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "run" / "records").iterdir())
    assert record["score"] > 0.65
    assert record["rows"] == {"train": 256, "test": 64}
    status, printed = train(*options, "--seeds", "0,1")
    assert "seed 0" not in printed
    assert "seed 1: accuracy" in printed
    assert "±" in (tmp_path / "run" / "results.md").read_text()


def write_pictures(folder: Path, number: int) -> Path:
    """A folder of images in color, by split and class."""
    for seed, split in enumerate(("train", "validation")):
        for i, (image, label) in enumerate(zip(*bars(number, seed), strict=True)):
            path = folder / split / ("standing", "lying")[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([image, image // 2, image // 4], axis=-1)).save(path)
    return folder


def test_a_trained_model_classifies_by_itself(train, tmp_path):
    status, printed = train(*MASA, "--images", write_pictures(tmp_path / "pictures", 256))
    assert status == 0, printed
    classify = pipeline("image-classification", model=str(tmp_path / "run" / "seed-0"))
    paths = sorted((tmp_path / "pictures" / "validation").rglob("*.png"))[::8]
    assert np.mean([classify(str(path))[0]["label"] == path.parent.name for path in paths]) > 0.7


def test_two_models_are_compared(train, tmp_path):
    train("--num_train_epochs", 1, folder="standard")
    train(*MASA, "--num_train_epochs", 1, folder="masa")
    main = runpy.run_path(str(SCRIPT.with_name("evaluate.py")))["main"]
    models = f"{tmp_path / 'standard'},{tmp_path / 'masa'}"
    assert main(["scores", "--model", models, "--output", str(tmp_path / "compared.json")]) == 0
    assert "| minus standard |" in (tmp_path / "compared.md").read_text()


def test_a_folder_of_images(tmp_path):
    loaded = load_images(str(write_pictures(tmp_path, 12)))
    assert loaded["train"].names == ("lying", "standing")
    assert loaded["test"].pixels.shape == (12, 3, 8, 8)
    images, labels = bars(12, 0)
    brightest = {(bytes(image), label == 0) for image, label in zip(images, labels, strict=True)}
    assert {(bytes(row["pixel_values"][0].numpy()), bool(row["labels"])) for row in loaded["train"]} == brightest


def test_batches_have_mean_0_and_deviation_1_and_are_moved_in_training_only(mnist):
    images = load_images(str(mnist))["train"]
    rows = [images[i] for i in range(len(images))]
    plain = ImageCollator(*images.statistics())(rows)
    assert plain["pixel_values"].mean() == pytest.approx(0, abs=1e-4)
    assert plain["pixel_values"].std() == pytest.approx(1, abs=1e-3)
    torch.manual_seed(0)
    moved = ImageCollator(*images.statistics(), flip=True, shift=True)(rows)
    is_same = (moved["pixel_values"] == plain["pixel_values"]).flatten(1).all(1)
    assert 0 < is_same.float().mean() < 0.2
    assert torch.equal(moved["labels"], plain["labels"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--depth_sharing", "masa", "--num_atoms", 4), "num_atoms=4 must be at least 1 and at most the layers of"),
        (("--config_overrides", "hidden=3"), "config_overrides"),
        (("--images", "nowhere/at/all"), "nowhere/at/all is no folder of images and no data set"),
        (("--seeds", "a"), "seeds='a' must be numbers"),
        (("--max_train_samples", -1), "max_train_samples=-1 must be 1 or more"),
    ],
)
def test_bad_options_are_named_before_training(train, tmp_path, options, said):
    status, printed = train(*options)
    assert status == 2
    assert said in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte.gz").unlink(), "lacks t10k-labels-idx1-ubyte"),
        (
            lambda folder: write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(9, np.uint8)),
            "12 images and 9 labels",
        ),
        (
            lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(b"\0\0\x08\x01\0\0\0\x09\0")
            ),
            "is no IDX file of bytes",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, change, said):
    for name in ("train", "t10k"):
        images, labels = bars(12, 0)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    change(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_images(str(tmp_path))
