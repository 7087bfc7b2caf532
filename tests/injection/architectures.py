"""A tiny random model of each architecture that sharing is tested with, and inputs for it."""

from dataclasses import dataclass

import torch
import transformers

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_TEXT, **_TOKENS, "num_key_value_heads": 2}
_IMAGE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_PIXELS, _BOTH, _SPEECH = "pixels", "both", "speech"


@dataclass(frozen=True)
class Architecture:
    """A class, the fields of its config, and what it reads besides text."""

    cls: str
    config: str
    fields: dict
    reads: str = "text"

    def model(self, **fields) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.fields | fields)
        return getattr(transformers, self.cls)(config).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        input_ids = torch.randint(3, 96, (2, 7), generator=generator)
        pixels = torch.randn(2, 3, self.fields.get("image_size", 16), 16, generator=generator)
        if self.reads == _PIXELS:
            return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
        if self.reads == _BOTH:
            return {"input_ids": input_ids, "pixel_values": pixels, "return_loss": True}
        if self.reads == _SPEECH:
            return {"input_features": torch.randn(2, 8, 32, generator=generator), "labels": input_ids}
        return {"input_ids": input_ids, "labels": input_ids}


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "gemma": Architecture("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", _GROUPED),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **_TOKENS},
    ),
    "bert": Architecture("BertForMaskedLM", "BertConfig", _TEXT),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", _TEXT),
    "modernbert": Architecture("ModernBertForMaskedLM", "ModernBertConfig", {**_TEXT, **_TOKENS}),
    "deberta": Architecture(
        "DebertaForMaskedLM",
        "DebertaConfig",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deberta_v2": Architecture(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", _IMAGE, _PIXELS),
    "dinov2": Architecture("Dinov2ForImageClassification", "Dinov2Config", _IMAGE, _PIXELS),
    "clip": Architecture(
        "CLIPModel", "CLIPConfig", {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 16}, _BOTH
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 96, "d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
            "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1, **_TOKENS,
        },
        _SPEECH,
    ),
}  # fmt: skip


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(**inputs)
    return outputs.logits_per_text if "logits_per_text" in outputs else outputs.logits
