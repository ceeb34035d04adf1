"""Tiny models with random weights, large enough that attention matters, and inputs for them.

Every model is made in eager attention and evaluation mode, without dropout. Weights are drawn wide enough that
scores spread over several units: a mask that is dropped or a head that is swapped changes the answer by far more
than rounding does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99)
DECODER = dict(SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=2)
GPT |= dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32)
WHISPER = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, max_source_positions=30, max_target_positions=40,
    num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    suppress_tokens=[], begin_suppress_tokens=[], dropout=0.0,
)  # fmt: skip
CLIP = dict(
    text_config=dict(
        SIZES, max_position_embeddings=40, eos_token_id=98, bos_token_id=97, attention_dropout=0.0
    ),
    vision_config=dict(VISION, patch_size=8),
    projection_dim=16,
)

BATCH, LENGTH = 3, 20


def _tokens(length: int = LENGTH, batch: int = BATCH) -> dict[str, Tensor]:
    """Token ids with one sequence padded on the right, one on the left and one whole."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length * 2 // 3 :] = 0
    mask[1, : length // 3] = 0
    return dict(input_ids=ids, attention_mask=mask)


def _labels(x: dict[str, Tensor]) -> Tensor:
    """The tokens, but for padding and the token after it, which a causal model would predict from padding."""
    real = x["attention_mask"].bool()
    return x["input_ids"].masked_fill(~(real & real.roll(1, 1)), -100)


def _text(length: int = LENGTH) -> dict[str, Tensor]:
    x = _tokens(length)
    return dict(x, labels=_labels(x))


def _clip() -> dict[str, Tensor]:
    x = _tokens()
    x["attention_mask"][1] = 1
    x["input_ids"][:, -1] = 98
    return dict(x, pixel_values=_image(), return_loss=True)


def _image() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def _vit() -> dict[str, Tensor]:
    return dict(pixel_values=_image(), labels=torch.tensor([0, 1, 1]))


def _whisper() -> dict[str, Tensor]:
    x = _tokens(12)
    x["attention_mask"][1] = 1  # whisper pads decoder inputs on the right
    return dict(
        input_features=torch.randn(BATCH, 8, 60, generator=torch.Generator().manual_seed(4)),
        decoder_input_ids=x["input_ids"],
        decoder_attention_mask=x["attention_mask"],
        labels=x["input_ids"].roll(-1, 1).masked_fill(x["attention_mask"] == 0, -100),
    )


def _t5() -> dict[str, Tensor]:
    x = _tokens()
    return dict(x, labels=x["input_ids"][:, :9].clone())


@dataclass(frozen=True)
class Kind:
    """A model of the zoo: its class and config, what it is called with, and what it does with attention.

    attention: how many attention modules `swap` replaces; 0 where the model has attention code of its own.
    masked: whether its inputs hide anything from any row.
    """

    model: str
    config: str
    sizes: dict
    inputs: object = _text
    attention: int = 2
    masked: bool = True


KINDS = {
    "bert": Kind("BertForMaskedLM", "BertConfig", BERT),
    "roberta": Kind("RobertaForMaskedLM", "RobertaConfig", BERT),
    "albert": Kind("AlbertForMaskedLM", "AlbertConfig", dict(BERT, embedding_size=16), attention=1),
    "distilbert": Kind(
        "DistilBertForMaskedLM", "DistilBertConfig",
        dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=99, dropout=0.0, attention_dropout=0.0),
    ),
    "electra": Kind("ElectraForMaskedLM", "ElectraConfig", dict(BERT, embedding_size=16)),
    "openai-gpt": Kind("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, attention=0),
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Config", GPT),
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", dict(DECODER, sliding_window=7)),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", dict(DECODER, head_dim=16)),
    "gemma2": Kind(
        "Gemma2ForCausalLM", "Gemma2Config",
        dict(DECODER, head_dim=16, sliding_window=7, query_pre_attn_scalar=16, attn_logit_softcapping=3.0),
    ),
    "gpt-oss": Kind(
        "GptOssForCausalLM", "GptOssConfig",
        dict(DECODER, head_dim=16, sliding_window=7, num_local_experts=4, num_experts_per_tok=2),
    ),
    "t5": Kind(
        "T5ForConditionalGeneration", "T5Config",
        dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0,
             dropout_rate=0.0),
        _t5, attention=6,
    ),
    "clip": Kind("CLIPModel", "CLIPConfig", CLIP, _clip, attention=4),
    "vit": Kind("ViTForImageClassification", "ViTConfig", dict(VISION, patch_size=8), _vit, masked=False),
    "whisper": Kind("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, _whisper, attention=6),
    "longformer": Kind(
        "LongformerForMaskedLM", "LongformerConfig",
        dict(BERT, attention_window=8, max_position_embeddings=80), lambda: _text(24), attention=0,
    ),
    "bigbird": Kind(
        "BigBirdForMaskedLM", "BigBirdConfig",
        dict(BERT, block_size=4, num_random_blocks=1, max_position_embeddings=96), lambda: _text(80), attention=0,
    ),
}  # fmt: skip


def make(name: str, **changes) -> nn.Module:
    """A model of the zoo; `changes` are of its config."""
    kind = KINDS[name]
    config = getattr(tf, kind.config)(**{**kind.sizes, **changes})
    config._attn_implementation = "eager"
    model = getattr(tf, kind.model)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() > 1 or "sinks" in path:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if "sinks" in path else 0.25))
            elif "bias" in path or "norm" in path.lower():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.set_attn_implementation("eager")
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    return KINDS[name].inputs()


def answer(out, x: dict[str, Tensor]) -> Tensor:
    """What a model's output says at real positions; rows of padding may hold anything."""
    if "logits" not in out:
        return out["logits_per_text"]
    real = x.get("decoder_attention_mask", x.get("attention_mask"))
    aligned = real is not None and real.shape == out["logits"].shape[:2]
    return out["logits"][real.bool()] if aligned else out["logits"]
