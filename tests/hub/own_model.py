"""A user's module, with a model of the user's own."""

from shared_bert import SharedBertForMaskedLM


class OwnModel(SharedBertForMaskedLM):
    pass
