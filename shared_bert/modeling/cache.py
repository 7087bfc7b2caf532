"""The cache of schemes whose key and value are one tensor: that tensor, once."""

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

SHARED_KEY_VALUE = "shared_kv_attention"


class OneStream:
    """Makes a cache layer keep `keys` [batch, heads, seq, head_dim] only and hand them out as `values` too.

    Assigning `values` is accepted and dropped: the layers of transformers treat keys and values alike, so what
    they do to the keys is all there is to do.
    """

    @property
    def values(self) -> torch.Tensor | None:
        return self.keys

    @values.setter
    def values(self, _):
        pass


class SharedKeyValueLayer(OneStream, DynamicLayer):
    """A growing cache layer of one stream."""

    _layer_type = SHARED_KEY_VALUE

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        return self.keys, self.keys


class StaticSharedKeyValueLayer(OneStream, StaticLayer):
    """A preallocated cache layer of one stream, for compiled generation."""

    _layer_type = SHARED_KEY_VALUE
