"""From text to batches: sources, tokenizers, packing, collation."""

from .blocks import Blocks, CorpusStatistics, StreamedBlocks, corpus_statistics
from .collation import CausalLanguageModelingCollator, MaskedLanguageModelingCollator, collate_blocks
from .packing import pack
from .python_docs import load_python_docs
from .sampling import calibration_batches
from .sources import first_rows, load_documents
from .tokenizers import check_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Blocks",
    "CausalLanguageModelingCollator",
    "CorpusStatistics",
    "MaskedLanguageModelingCollator",
    "StreamedBlocks",
    "calibration_batches",
    "check_tokenizer",
    "collate_blocks",
    "corpus_statistics",
    "first_rows",
    "load_documents",
    "load_python_docs",
    "load_tokenizer",
    "pack",
    "train_tokenizer",
]
