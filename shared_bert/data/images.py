"""Images with labels, kept in memory: from the Hub, a folder of images, or the files of MNIST and its kin."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

_IDX = {"train": "train-{}-ubyte", "test": "t10k-{}-ubyte"}  # the files of MNIST, gzipped or not
_SHIFT = 2  # pixels


@dataclass
class Images(Dataset):
    """Images of one size.

    Attributes:
        pixels: uint8 [images, channels, height, width].
        labels: int64 [images].
        names: of the classes.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def first(self, number: int | None) -> "Images":
        """Return the first images; all for None."""
        return Images(self.pixels[:number], self.labels[:number], self.names)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the standard deviation of each channel, from 0 to 1."""
        channels = self.pixels.transpose(0, 1).flatten(1).double() / 255
        return channels.mean(1).float(), channels.std(1).clamp(min=1e-6).float()


def load_images(source: str, image_column: str | None = None, label_column: str | None = None) -> dict[str, Images]:
    """Return the images to train on, "train", and to test on, "test".

    Args:
        source: a folder with the four files of MNIST, a folder of images (``train/CLASS/….png`` and the same in
            ``test`` or ``validation``), or a data set on the Hub.
        image_column, label_column: of the Hub's data set; by default the first of their kind.

    Raises:
        ValueError: no images, images of several sizes, or a data set without these splits or columns.
    """
    if Path(source).is_dir() and list(Path(source).glob("train-images*")):
        return {split: _load_idx(Path(source), name) for split, name in _IDX.items()}
    return _load_dataset(source, image_column, label_column)


def _load_idx(folder: Path, name: str) -> Images:
    pixels = _read_idx(folder, name.format("images-idx3"))
    labels = _read_idx(folder, name.format("labels-idx1"))
    if len(pixels) != len(labels):
        raise ValueError(f"{folder} has {len(pixels)} images and {len(labels)} labels in {name}")
    names = tuple(str(label) for label in range(int(labels.max()) + 1))
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long(), names)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, the type, the number of dimensions, the dimensions, the values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} lacks {name} (or {name}.gz)")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * dimensions], ">u4")
    values = np.frombuffer(content[4 + 4 * dimensions :], np.uint8)
    if content[:3] != b"\0\0\x08" or shape.prod() != len(values):
        raise ValueError(f"{path} is damaged: it is no IDX file of bytes")
    return values.reshape(shape).copy()


def _load_dataset(source: str, image_column: str | None, label_column: str | None) -> dict[str, Images]:
    from datasets import ClassLabel, Image, load_dataset

    options = {"path": "imagefolder", "data_dir": source} if Path(source).is_dir() else {"path": source}
    try:
        splits = load_dataset(**options)
    except Exception as error:  # `datasets` raises many
        raise ValueError(f"{source} is no folder of images and no data set that can be loaded: {error}") from error
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{source} has the splits {', '.join(splits)}; it needs train, and test or validation")
    features = splits["train"].features
    image = image_column or next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    label = label_column or next((name for name, kind in features.items() if isinstance(kind, ClassLabel)), None)
    for name, what in ((image, "images"), (label, "labels of classes")):
        if name not in features:
            raise ValueError(f"{source} has no column {name or f'of {what}'}; its columns are {', '.join(features)}")
    names = tuple(features[label].names)
    return {
        "train": _in_memory(source, splits["train"], image, label, names),
        "test": _in_memory(source, splits[test], image, label, names),
    }


def _in_memory(source: str, rows, image: str, label: str, names: tuple[str, ...]) -> Images:
    sizes = set()

    def arrays() -> Iterator[np.ndarray]:
        for picture in rows[image]:
            array = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
            sizes.add(array.shape)
            if len(sizes) > 1:
                raise ValueError(f"{source} has images of the sizes {sorted(sizes)}: bring them to one")
            yield array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    return Images(torch.from_numpy(np.stack(list(arrays()))), torch.tensor(rows[label]), names)


@dataclass
class ImageCollator:
    """Brings images to mean 0 and standard deviation 1 per channel.

    Args:
        mean, std: of the channels, from 0 to 1.
        flip: mirror half of the images.
        shift: move images by up to two pixels.
    """

    mean: torch.Tensor
    std: torch.Tensor
    flip: bool = False
    shift: bool = False

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([row["pixel_values"] for row in rows]).float() / 255
        pixels = (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        if self.flip:
            pixels = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
        if self.shift:
            height, width = pixels.shape[-2:]
            padded = torch.nn.functional.pad(pixels, [_SHIFT] * 4)
            corners = torch.randint(0, 2 * _SHIFT + 1, (len(rows), 2)).tolist()
            pixels = torch.stack(
                [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
            )
        return {"pixel_values": pixels, "labels": torch.stack([row["labels"] for row in rows])}
