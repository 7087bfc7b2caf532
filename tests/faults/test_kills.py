"""kill -9 at any moment: what is whole is right, and the run that goes on ends as if nothing had happened."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from transformers import AutoModel

from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.data import load_tokenizer
from shared_bert.folders import load_model
from shared_bert.training.checkpoints import checkpoints

from ..training.runs import MASA, recipe, write_text
from . import jobs
from .processes import assert_same, run_job

pytestmark = pytest.mark.slow

SEED = random.SystemRandom().randrange(2**32)
SHORT = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4}
HEALED = (
    "--attention_scheme shared_kv --heal --block_size 32 --sample_by line --validation_split 0.1 --max_steps 6 "
    "--per_device_train_batch_size 4 --learning_rate 1e-2 --save_steps 2 --use_cpu --disable_tqdm true --train_file"
)


def check_what_is_whole(output: Path, undisturbed: Path):
    """Whatever can be taken for a model or a checkpoint is that of the run that nobody killed."""
    if (output / "config.json").exists():
        load_model(str(output), STOCK_CLASSES)
        load_tokenizer(str(output))
        assert_same(output, undisturbed)
    else:
        with pytest.raises((OSError, ValueError)):
            AutoModel.from_pretrained(output)
    whole = [path for path in checkpoints(output) if jobs.is_whole(path)]
    for path in [*whole, *output.glob("converted")]:
        assert_same(path, undisturbed / path.name)


def kill_again_and_again(job, arguments, output: Path, undisturbed: Path, kills: int, **places):
    """Kills a job `kills` times, each time it goes on, anew where it came to its end, and lets it end at last."""
    cache = places["cache"].with_name("whole_cache")
    status, number_of_events = run_job(job, *arguments(undisturbed), **places | {"cache": cache})
    assert status == 0, places["log"].read_text()
    generator = random.Random(SEED)
    while kills:
        kill_at = generator.randint(1, number_of_events)
        status, _ = run_job(job, *arguments(output), kill_at=kill_at, **places)
        print(f"seed {SEED}: {job.__name__}, event {kill_at} of {number_of_events}, status {status}")
        assert status in (0, -signal.SIGKILL), places["log"].read_text()[-3000:]
        check_what_is_whole(output, undisturbed)
        if status == 0:
            assert_same(output, undisturbed)
            shutil.rmtree(output)
        else:
            kills -= 1
    status, _ = run_job(job, *arguments(output), **places)
    assert status == 0, places["log"].read_text()[-3000:]
    check_what_is_whole(output, undisturbed)
    assert_same(output, undisturbed)
    assert not list(output.rglob("*unfinished*"))


def test_packing(tmp_path, places):
    """What was read and packed by halves is not in the cache."""
    text = write_text(tmp_path / "text.txt")
    places_of_both = (tmp_path / "out", tmp_path / "whole")
    kill_again_and_again(jobs.run_packing, lambda output: [text, output], *places_of_both, 4, **places)


def test_pretraining(tmp_path, places):
    keys = recipe(tmp_path, "shared_gpt", config_overrides={**MASA, "coefficient_source": "network"}, **SHORT)

    def arguments(output):
        return [{**keys, "output_dir": str(output)}]

    kill_again_and_again(jobs.run_pretraining, arguments, tmp_path / "run", tmp_path / "whole", 4, **places)


def test_conversion(tmp_path, places, stock):
    options = ["--depth_sharing", "masa", "--num_atoms", "1", "--calibration", str(write_text(tmp_path / "text.txt"))]
    options += ["--sample_by", "line", "--block_size", "32", "--calibration_tokens", "500"]

    def arguments(output):
        return [stock, output, *options]

    kill_again_and_again(jobs.run_conversion, arguments, tmp_path / "out", tmp_path / "whole", 3, **places)


def test_healing(tmp_path, places, stock):
    options = [*HEALED.split(), str(write_text(tmp_path / "text.txt"))]

    def arguments(output):
        return [stock, output, *options]

    kill_again_and_again(jobs.run_healing, arguments, tmp_path / "out", tmp_path / "whole", 5, **places)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
