"""Pushes to the Hub: a folder that loads with or without this package, in one commit or none.

`create_commit` is used, since huggingface_hub's `upload_folder` may split a folder into several commits, and
transformers' pushes include `training_args.bin`, a pickle.
"""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling
from ..conversion.stock import to_stock
from ..folders import TOKENIZER_FILES, copy_tokenizer
from ..injection.sharing_config import sharing_record
from .cards import MARK, model_card, read_json

_CODE = {path.name for path in Path(modeling.__file__).parent.glob("*.py")}
_WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_METRICS = ("*_results.json", "loss_curve.*")
_PICKLES = ("*.bin", "*.pt", "*.pth")


class PushError(OSError):
    """A failed push; the message states what the repository holds now."""


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    tag: str | None = None,
    source: str | Path | None = None,
    as_stock: bool = False,
) -> CommitInfo:
    """Push a model with its code, tokenizer and card: the `push_to_hub` of every model of this package.

    A stock model that shares (see `share`) is pushed by `shared_bert.hub.push_to_hub(model, …)`, and has no code.
    Arguments not named here are those of `PreTrainedModel.push_to_hub`. `revision` is a branch, which is created if it
    does not exist.

    Args:
        tag: a tag for the new commit.
        source: the folder of the run or checkpoint that the unchanged model is from; its metrics are pushed and
            shown on the card. Without it there are no results, and the tokenizer is that of where the model was
            loaded from, if any.
        as_stock: push the result of `to_stock` or `dequantize`, which needs neither code nor this package.

    Returns:
        The commit.

    Raises:
        ValueError: an invalid name, an existing tag, a public repository with `private`, a damaged file of metrics,
            a model without stock counterpart; before anything is uploaded.
        PushError: the Hub refused or could not be reached. The message states what it holds now.
    """
    repo_id = full_name(repo_id, token)
    with TemporaryDirectory() as name:
        folder = Path(name)
        with _preparing(repo_id):
            (_as_stock(model) if as_stock else model).save_pretrained(folder, max_shard_size=max_shard_size)
            if not as_stock:
                _add_code(model.config, folder)
            _add_tokenizer(source or model.name_or_path, folder)
            _add_metrics(source, folder)
            tags = [*([tags] if isinstance(tags, str) else tags or []), *(model.model_tags or [])]
            card = model_card(
                type(model), model.config, repo_id, source, revision, as_stock, _has_tokenizer(folder), tags
            )
            card.save(folder / "README.md")
        return upload(
            folder,
            repo_id,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
        )


def _as_stock(model: PreTrainedModel) -> PreTrainedModel:
    return to_stock(model) if sharing_record(model.config) is None else copy.deepcopy(model).dequantize()


@contextmanager
def _preparing(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of them
        raise PushError(f"the push to {repo_id} could not be prepared ({error}); nothing was uploaded") from error


def full_name(repo_id: str, token: bool | str | None = None) -> str:
    """Prefix a repository's name with the user's, unless it has a namespace.

    Raises:
        ValueError: an invalid name.
        PushError: the Hub does not return the user's name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid name of a repository: {error}") from error
    if "/" in repo_id:
        return repo_id
    try:
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"
    except Exception as error:
        raise PushError(f"the push to {repo_id} failed ({error}); nothing was uploaded") from error


def stage_checkpoint(
    checkpoint: str | Path, folder: str | Path, repo_id: str, revision: str | None = None, to_resume: bool = False
):
    """Copy the files for a push of a checkpoint into `folder`, and write the card.

    Args:
        to_resume: also copy the whole checkpoint, with the optimizer's state, as `last-checkpoint/`.

    Raises:
        ValueError: a damaged file of metrics.
        PushError: a full disk.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    with _preparing(repo_id):
        for path in (path for pattern in (*_WEIGHTS, "*.py") for path in checkpoint.glob(pattern)):
            shutil.copy(path, folder)
        _add_code(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False), folder)
        _add_tokenizer(checkpoint, folder)
        _add_metrics(checkpoint, folder)
        write_card(checkpoint, folder, repo_id, revision)
        if to_resume:
            # It may hold a token, and is not needed.
            ignored = shutil.ignore_patterns("training_args.bin")
            shutil.copytree(checkpoint, folder / "last-checkpoint", ignore=ignored)


def write_card(saved: str | Path, folder: str | Path, repo_id: str, revision: str | None = None):
    """Write the card of a saved model or a checkpoint into `folder`."""
    config = AutoConfig.from_pretrained(saved, trust_remote_code=False)
    # A user's own class is described as the base model of its config.
    if sharing_record(config) is not None:
        model_class = getattr(transformers, config.architectures[0])
    else:
        model_class = getattr(modeling, config.architectures[0], getattr(modeling, config.auto_classes["AutoModel"]))
    card = model_card(model_class, config, repo_id, saved, revision, has_tokenizer=_has_tokenizer(Path(saved)))
    card.save(Path(folder, "README.md"))


def _add_code(config: PreTrainedConfig, folder: Path):
    if sharing_record(config) is not None:  # transformers has it
        return
    # `save_pretrained` does this for classes of this package, but not for subclasses.
    file = Path(modeling.__file__).with_name(f"modeling_{config.model_type}.py")
    for path in (file, *get_relative_import_files(file)):
        shutil.copy(path, folder)


def _add_tokenizer(source: str | Path, folder: Path):
    try:
        if str(source):
            copy_tokenizer(str(source), folder)
    except (HFValidationError, HfHubHTTPError, FileNotFoundError):
        return  # the model's source no longer exists, or is not a repository


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists()


def _add_metrics(source: str | Path | None, folder: Path):
    for path in (path for pattern in _METRICS for path in (Path(source).glob(pattern) if source else ())):
        if path.suffix == ".json":
            read_json(path)
        shutil.copy(path, folder)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> CommitInfo:
    """Commit the files of a folder, and delete files of the same kinds from earlier pushes.

    A missing repository or branch is created. A card that was not written by this package stays.

    Raises:
        ValueError, PushError: as of `push_to_hub`.
    """
    api = HfApi(token=token)
    before = None
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        refs = api.list_repo_refs(repo_id)
        refused = None
        if tag is not None and tag in [ref.name for ref in refs.tags]:
            refused = f"already has a tag {tag!r}: name another"
        elif private and not api.model_info(repo_id).private:
            refused = "already exists and is public: make it private in its settings, or name another"
        if refused is None:
            if revision not in (None, *(ref.name for ref in refs.branches)):
                api.create_branch(repo_id, branch=revision)
            before = api.model_info(repo_id, revision=revision).sha
            commit = api.create_commit(
                repo_id,
                _operations(api, Path(folder), repo_id, revision),
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=None if create_pr else before,
            )
            if tag is not None:
                api.create_tag(repo_id, tag=tag, revision=commit.oid)
            return commit
    except Exception as error:  # after any error the user must know what the Hub holds now
        raise PushError(_what_happened(api, repo_id, revision, before, error)) from error
    raise ValueError(f"{repo_id} {refused}")


def _operations(api: HfApi, folder: Path, repo_id: str, revision: str | None):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    added = {path.relative_to(folder).as_posix(): path for path in paths}
    there = set(api.list_repo_files(repo_id, revision=revision))
    if "README.md" in there and not _is_ours(api, repo_id, revision):
        added.pop("README.md", None)
    # Files of these kinds from an earlier push would be taken for part of the new one.
    own = (*_WEIGHTS, *_METRICS, *_PICKLES, *(TOKENIZER_FILES if _has_tokenizer(folder) else ()))
    stale = [
        name
        for name in there - added.keys()
        if name in _CODE or ("/" not in name and any(fnmatch(name, pattern) for pattern in own))
    ]
    additions = [CommitOperationAdd(name, path) for name, path in added.items()]
    return additions + [CommitOperationDelete(name) for name in stale]


def _is_ours(api: HfApi, repo_id: str, revision: str | None) -> bool:
    path = api.hf_hub_download(repo_id, "README.md", revision=revision)
    return MARK in Path(path).read_text(encoding="utf-8")


def _what_happened(api: HfApi, repo_id: str, revision: str | None, before: str | None, error: Exception) -> str:
    branch = revision or "main"
    if not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error  # for a failed upload, only the cause has the reason
    cause = " ".join(str(error).split("For more information")[0].split())
    if "401" in cause:
        cause += "; log in with `hf auth login`, or set HF_TOKEN"
    try:
        now = api.model_info(repo_id, revision=revision).sha
    except RepositoryNotFoundError:
        state = "nothing was uploaded"
    except Exception:
        state = "what the Hub holds now is not known; a commit is made as a whole or not at all"
    else:
        unchanged = f"nothing was committed: {branch} is at {now[:8]}, as before"
        state = unchanged if before in (None, now) else f"{branch} was at {before[:8]} and is at {now[:8]} now"
    return f"the push to {repo_id} failed ({cause}); {state}"
