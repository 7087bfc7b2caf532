"""The cache of schemes whose key and value are one tensor: that tensor, once."""

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

SHARED_KEY_VALUE = "shared_kv_attention"


class OneStream:
    """A cache layer that keeps `keys` [batch, heads, seq, head_dim] only, and returns them as `values` too.

    Assignments to `values` are ignored, since transformers' layers treat them as they treat the keys. Methods that
    would do much to them in vain, or fail where the keys are changed already, are overridden.
    """

    @property
    def values(self) -> torch.Tensor | None:
        return self.keys

    @values.setter
    def values(self, _):
        pass

    def reorder_cache(self, beam_idx: torch.LongTensor):
        if self.get_seq_length() > 0:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))


class SharedKeyValueLayer(OneStream, DynamicLayer):
    """A growing cache layer of one stream."""

    # transformers' registry of cache layers: caches find the class by a config's `layer_types`.
    _layer_type = SHARED_KEY_VALUE

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        return self.keys, self.keys

    def batch_repeat_interleave(self, repeats: int):
        if self.get_seq_length() > 0:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor):
        if self.get_seq_length() > 0:
            self.keys = self.keys[indices]


class StaticSharedKeyValueLayer(OneStream, StaticLayer):
    """A preallocated cache layer of one stream, for compiled generation."""

    _layer_type = SHARED_KEY_VALUE
