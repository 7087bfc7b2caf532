"""What the pushes of a stock `Trainer` lack."""

from transformers import TrainerCallback
from transformers.dynamic_module_utils import custom_object_save

from .uploads import write_card


class CodeAndCard(TrainerCallback):
    """Puts the code of the model and its card into the output folder before a stock `Trainer` pushes it.

    Trainer's pushes during training copy weights and config from the checkpoint, whose `auto_map` then names code that
    is not there. `PretrainingTrainer` needs no such callback.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            custom_object_save(model, args.output_dir)
            model.config.save_pretrained(args.output_dir)
            write_card(args.output_dir, args.output_dir, args.hub_model_id or args.output_dir, args.hub_revision)
