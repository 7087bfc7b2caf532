"""Loading saved models with the class they name, and writing folders that appear whole or not at all."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .conversion.families import SHARED_CLASSES, STOCK_CLASSES
from .injection.sharing_config import METHOD

# Files that are copied with a model: its tokenizer or processor, and the pooling config of sentence-transformers.
TOKENIZER_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*",
)  # fmt: skip


def load_model(name_or_path: str, classes: Iterable[type[PreTrainedModel]]) -> PreTrainedModel:
    """Load a model of a folder or of the Hub with the class that its config's `architectures` names.

    No code of the folder runs, and no pickled weights are loaded.

    Raises:
        ValueError: that class is none of `classes`, or weights are missing or damaged.
        OSError: the model does not exist.
    """
    try:
        model, info = _load(name_or_path, {cls.__name__: cls for cls in classes})
    except (SafetensorError, StrictDataclassError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded: {error}") from error
    if lacking := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise ValueError(f"{name_or_path} lacks weights of a {type(model).__name__}: {', '.join(lacking[:3])}")
    return model


def load_any_model(name_or_path: str) -> PreTrainedModel:
    """Load a model of this package or of transformers; see `load_model`."""
    named = _named_classes(_read_config(name_or_path))
    return load_model(name_or_path, [*SHARED_CLASSES, *STOCK_CLASSES, *named])


def load_sharing_model(name_or_path: str) -> PreTrainedModel:
    """Load a model of this package, or a stock model that shares; see `load_model`."""
    config = _read_config(name_or_path)
    record = getattr(config, "quantization_config", None) or {}
    return load_model(name_or_path, _named_classes(config) if record.get("quant_method") == METHOD else STOCK_CLASSES)


def _named_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Return the classes of transformers that a config names as its model's."""
    named = (getattr(transformers, str(name), None) for name in config.architectures or [])
    return [cls for cls in named if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]


def _read_config(name_or_path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError) as error:  # such as for a model_type that is a list
        raise ValueError(f"{name_or_path} cannot be loaded, its config is invalid: {error}") from error


def _load(name_or_path: str, classes: dict[str, type[PreTrainedModel]]) -> tuple[PreTrainedModel, dict]:
    config = _read_config(name_or_path)
    named = config.architectures or ["model of no named class"]
    name = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    if name not in classes:
        raise ValueError(f"{name_or_path} holds a {name} and must be one of {', '.join(classes)}")
    wanted = classes[name].config_class
    if not isinstance(config, wanted):
        raise ValueError(
            f"{name_or_path} holds a {name}, whose model_type is {wanted.model_type!r}, not {config.model_type!r}"
        )
    # A config file could name a kernel of the Hub, whose code would run.
    config._attn_implementation = None
    options = {"config": config, "output_loading_info": True, "use_safetensors": True}
    model, info = classes[name].from_pretrained(name_or_path, **options)
    if info["missing_keys"] and all(weight.startswith("pooler.") for weight in info["missing_keys"]):
        return classes[name].from_pretrained(name_or_path, add_pooling_layer=False, **options)
    return model, info


def copy_tokenizer(name_or_path: str, folder: Path):
    """Copy the tokenizer's files of a model into `folder`, unchanged, if it has any."""
    source = Path(name_or_path)
    if not source.is_dir():
        source = Path(snapshot_download(name_or_path, allow_patterns=list(TOKENIZER_FILES)))
    for path in (path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)


def check_free(output: str | Path):
    """Raise a ValueError unless `output` is missing or an empty folder."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: name another")


@contextmanager
def writing(folder: str | Path, unfinished: Path) -> Iterator[None]:
    """Remove `unfinished` after the block, which writes it and moves it to `folder`.

    Raises:
        OSError: naming the folder and the room on its disk, where something could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk so
        free = shutil.disk_usage(unfinished.parent).free / 2**20
        raise OSError(f"{folder} could not be written ({free:.1f} MiB are free on its disk): {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """Yield a folder to write into, ``output.unfinished``, which is renamed to `output` at the end.

    Raises:
        ValueError: `output` exists and is not an empty folder.
        OSError: it could not be written.
    """
    check_free(output)
    output = Path(output).resolve()
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
    unfinished.mkdir(parents=True)
    with writing(output, unfinished):
        yield unfinished
        unfinished.replace(output)
