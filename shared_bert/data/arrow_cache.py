"""Data sets that are written once and then read from the cache of `datasets`."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, config
from datasets.arrow_writer import ArrowWriter


def cached_dataset(name: str, features: Features, tables: Callable[[], Iterable[pa.Table]]) -> Dataset:
    """Return the data set cached under `name`; if there is none, write it first from `tables()`.

    `name` must change with everything that the rows depend on: put a hash into it.
    """
    path = Path(config.HF_DATASETS_CACHE) / "shared_bert" / f"{name}.arrow"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The final name appears only with the whole file behind it, whatever interrupts the writing.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = os.path.join(folder, path.name)
            with ArrowWriter(features=features, path=unfinished) as writer:
                for table in tables():
                    writer.write_table(table)
                writer.finalize()
            os.replace(unfinished, path)
    return Dataset.from_file(str(path))
