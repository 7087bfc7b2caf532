"""Pushes of a `Trainer`."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from .uploads import PushError, stage_checkpoint, upload, write_card

logger = logging.getLogger(__name__)


class CheckpointPushes:
    """Mixin for complete pushes of a `Trainer`: `class MyTrainer(CheckpointPushes, Trainer)`.

    Each is one commit, with the code that the config's `auto_map` names and a card. Trainer's own pushes during
    training lack both, and contain `training_args.bin`, a pickle that may hold a token. `SafeTrainer` is a subclass.
    """

    # An internal method of Trainer: its callbacks run before a checkpoint's push, and cannot replace it.
    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Push a checkpoint in the background. An error becomes a warning, and training continues.

        `hub_strategy="all_checkpoints"` also gives each a branch: step-500, step-1000 … "checkpoint" adds
        `last-checkpoint/`, with the pickles that training needs to resume.
        """
        args, step = self.args, self.state.global_step
        if not Path(checkpoint_folder, "config.json").exists():  # adapters only, whose card PEFT writes
            super()._push_from_checkpoint(checkpoint_folder)
            return
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        of_all = args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress()
        elif not (args.hub_always_push or of_all):
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        branches = [args.hub_revision]
        if of_all:
            branches.append(f"step-{step}")
        for branch in branches:
            folder = TemporaryDirectory()  # the checkpoint may be deleted before it is pushed
            try:
                to_resume = args.hub_strategy == HubStrategy.CHECKPOINT
                stage_checkpoint(checkpoint_folder, folder.name, self.hub_model_id, branch, to_resume)
            except (OSError, ValueError) as error:
                logger.warning("%s is not pushed: %s", checkpoint_folder, error)
                return
            message = f"Training in progress, step {step}"
            job = hf_api().run_as_future(_push, folder, self.hub_model_id, message, branch, args.hub_token)
            self.push_in_progress.jobs.append(job)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the model and push it with its code, tokenizer, metrics and card, in one commit.

        Raises:
            PushError: the push failed. The model is saved.
        """
        token = token or self.args.hub_token
        revision = revision or self.args.hub_revision
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()
        folder = TemporaryDirectory()
        stage_checkpoint(self.args.output_dir, folder.name, self.hub_model_id, revision)
        push = (folder, self.hub_model_id, commit_message, revision, token)
        return _push(*push) if blocking else hf_api().run_as_future(_push, *push)

    def create_model_card(self, *args, **kwargs):
        """Write the model card of this package from the files of the output folder."""
        if self.is_world_process_zero():
            name = self.hub_model_id or Path(self.args.output_dir).absolute().name
            write_card(self.args.output_dir, self.args.output_dir, name, self.args.hub_revision)


def _push(folder: TemporaryDirectory, repo_id: str, message: str, revision: str | None, token: str | None):
    with folder:
        try:
            return upload(folder.name, repo_id, commit_message=message, revision=revision, token=token)
        except PushError as error:
            logger.warning("%s", error)  # in the background it would be lost
            raise
