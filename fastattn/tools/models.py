"""Whole models of real width and few layers, with random weights: the suite `models`.

Each model is made three times with equal weights: in eager attention, in SDPA and swapped by `fastattn.swap`. They
get the same batch of 8 sequences of mixed lengths to 256, padded as the model's users pad, or 8 images. Models come
without a head over the vocabulary, which is the same product of matrices in all three.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastattn

from .cases import Case, NotAvailable
from .workloads import PACKING, WITHOUT_SDPA, Workload

BATCH, LENGTH = 8, 256
LENGTHS = (256, 224, 180, 150, 120, 90, 60, 31)
TOKENS = 1000

_BERT = dict(
    vocab_size=TOKENS, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
_GPT = dict(vocab_size=TOKENS, n_layer=2, n_positions=LENGTH, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
_DECODER = dict(vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
_VISION = dict(num_hidden_layers=2, hidden_size=768, num_attention_heads=12, intermediate_size=3072)


def _mask(side: str) -> Tensor:
    """[8, 256], 1 for real tokens; padding on the right, or on the left."""
    real = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    return (real if side == "right" else real.flip(1)).long()


def _ids(generator: torch.Generator) -> Tensor:
    return torch.randint(3, TOKENS - 3, (BATCH, LENGTH), generator=generator)


def _text(side: str) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda generator: dict(input_ids=_ids(generator), attention_mask=_mask(side))


def _pairs(generator: torch.Generator) -> dict[str, Tensor]:
    """An encoder's input and, of the same lengths, a decoder's."""
    mask = _mask("right")
    return dict(
        input_ids=_ids(generator),
        attention_mask=mask,
        decoder_input_ids=_ids(generator),
        decoder_attention_mask=mask,
    )


def _images(generator: torch.Generator) -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(BATCH, 3, 224, 224, generator=generator))


def _clip(generator: torch.Generator) -> dict[str, Tensor]:
    ids, lengths = _ids(generator)[:, :77], (77, 60, 45, 33, 20, 12, 9, 7)
    mask = (torch.arange(77) < torch.tensor(lengths)[:, None]).long()
    ids[torch.arange(BATCH), mask.sum(1) - 1] = TOKENS - 1
    return dict(input_ids=ids, attention_mask=mask, **_images(generator))


def _speech(generator: torch.Generator) -> dict[str, Tensor]:
    return dict(
        input_features=torch.randn(BATCH, 80, 2 * LENGTH, generator=generator),
        decoder_input_ids=_ids(generator),
        decoder_attention_mask=_mask("right"),
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """cls, config, sizes: what transformers makes it of. inputs: generator -> keywords of its forward."""

    cls: str
    config: str
    sizes: dict[str, Any]
    inputs: Callable[[torch.Generator], dict[str, Tensor]] = _text("right")


# fmt: off
MODELS: dict[str, Model] = {
    "bert-base": Model("BertModel", "BertConfig", _BERT),
    "roberta-base": Model("RobertaModel", "RobertaConfig", dict(_BERT, max_position_embeddings=LENGTH + 2)),
    "albert-base": Model("AlbertModel", "AlbertConfig",
        dict(_BERT, hidden_size=768, num_attention_heads=12, intermediate_size=3072)),
    "distilbert-base": Model("DistilBertModel", "DistilBertConfig",
        dict(vocab_size=TOKENS, n_layers=2, dropout=0.0, attention_dropout=0.0)),
    "electra-small": Model("ElectraModel", "ElectraConfig", dict(_BERT, num_hidden_layers=4)),
    "openai-gpt": Model("OpenAIGPTModel", "OpenAIGPTConfig", dict(_GPT, n_layer=1)),
    "gpt2": Model("GPT2Model", "GPT2Config", _GPT, _text("left")),
    "llama-135m": Model("LlamaModel", "LlamaConfig",
        dict(_DECODER, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
             num_key_value_heads=3), _text("left")),
    "mistral-window": Model("MistralModel", "MistralConfig",
        dict(_DECODER, hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12,
             num_key_value_heads=4, head_dim=64, sliding_window=96), _text("left")),
    "qwen3-0.6b": Model("Qwen3Model", "Qwen3Config",
        dict(_DECODER, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128), _text("left")),
    "gemma2-softcap": Model("Gemma2Model", "Gemma2Config",
        dict(_DECODER, hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4, head_dim=128, query_pre_attn_scalar=128, sliding_window=96,
             attn_logit_softcapping=50.0), _text("left")),
    "gpt-oss-sinks": Model("GptOssModel", "GptOssConfig",
        dict(_DECODER, hidden_size=768, intermediate_size=768, num_hidden_layers=2, num_attention_heads=16,
             num_key_value_heads=4, head_dim=64, sliding_window=96, num_local_experts=2, num_experts_per_tok=2),
        _text("left")),
    "t5-small": Model("T5Model", "T5Config",
        dict(vocab_size=TOKENS, d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=2, dropout_rate=0.0,
             use_cache=False), _pairs),
    "clip-vit-b32": Model("CLIPModel", "CLIPConfig",
        dict(text_config=dict(vocab_size=TOKENS, num_hidden_layers=2, hidden_size=512, num_attention_heads=8,
                              intermediate_size=2048, eos_token_id=TOKENS - 1),
             vision_config=dict(_VISION, patch_size=32)), _clip),
    "vit-base": Model("ViTModel", "ViTConfig",
        dict(_VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), _images),
    "whisper-tiny": Model("WhisperModel", "WhisperConfig",
        dict(vocab_size=TOKENS, d_model=384, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6,
             decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, max_source_positions=LENGTH,
             max_target_positions=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=1, dropout=0.0, use_cache=False), _speech),
    "longformer-base": Model("LongformerModel", "LongformerConfig",
        dict(_BERT, num_hidden_layers=1, attention_window=64, max_position_embeddings=LENGTH + 2)),
    "bigbird-base": Model("BigBirdModel", "BigBirdConfig",
        dict(_BERT, num_hidden_layers=1, block_size=16, num_random_blocks=1, max_position_embeddings=LENGTH)),
}
# fmt: on


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the table in eager attention, in evaluation mode; equal weights for every call and dtype."""
    try:
        import transformers
    except ImportError as error:
        raise NotAvailable(f"transformers is not installed ({error})") from error
    transformers.logging.set_verbosity_error()
    about = MODELS[name]
    config = getattr(transformers, about.config)(**about.sizes)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = getattr(transformers, about.cls)(config)
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:  # scores of a few units, as in trained models
                nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
                if path.endswith("Attention.q.weight"):  # T5's, which does not scale its scores
                    parameter.data.mul_(config.d_kv**-0.5)
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = MODELS[name].inputs(torch.Generator().manual_seed(1))
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in given.items()}


def answer(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """What the model says at real positions, float32; rows of padding may hold anything."""
    out = model(**given)
    if "logits_per_text" in out:
        return torch.cat((out["text_embeds"], out["image_embeds"])).float()
    hidden = out["last_hidden_state"].float()
    real = given.get("decoder_attention_mask", given.get("attention_mask"))
    return hidden if real is None else hidden * real.unsqueeze(-1)


def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a weighted mean square of the answer, from a forward and a backward.

    Weighted, because the plain square of CLIP's answer, which has length 1, is constant.
    """
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        y = answer(model, given)
        (y.square() * torch.linspace(0, 1, y.shape[-1], device=y.device)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _share(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference as a share of the largest number."""
    worst = max((actual[name].float() - e).abs().max() for name, e in expected.items())
    return (worst / max(e.abs().max() for e in expected.values())).item()


def case(row: Workload, device: str) -> Case:
    """The model of a row three times, and how far each is from eager in float32 with the same weights."""
    name, dtype = row.shape.model, row.torch_dtype
    models = {"eager": make(name, dtype).to(device)}
    models["ours"] = copy.deepcopy(models["eager"])
    packs = name in PACKING
    report = fastattn.swap(models["ours"], pack=packs)
    if packs:
        models["unpacked"] = copy.deepcopy(models["eager"])
        fastattn.swap(models["unpacked"])
    if name not in WITHOUT_SDPA:
        models["torch"] = copy.deepcopy(models["eager"])
        models["torch"].set_attn_implementation("sdpa")
    given = {key: t.to(device) for key, t in inputs(name, dtype).items()}

    def results(model, given):
        if row.training:
            return gradients(model, given)
        with torch.no_grad():
            return {"answer": answer(model, given)}

    exact = copy.deepcopy(models["eager"]).float()
    exact_given = {key: t.float() if t.is_floating_point() else t for key, t in given.items()}
    expected = results(exact, exact_given)
    differences = {way: _share(results(model, given), expected) for way, model in models.items()}
    del exact, expected

    def variant(model):
        if row.training:
            return lambda: gradients(model, given)
        return lambda: model(**given)

    order = [way for way in ("ours", "unpacked", "torch", "eager") if way in models]
    facts = {
        "differences": differences,
        "swapped": dict(Counter(f"{e.before.split(' ')[0]} -> {e.after}" for e in report.swapped)),
        "left": dict(Counter(f"{e.before.split(' ')[0]}: {e.reason}" for e in report.left)),
    }
    return Case(row, {way: variant(models[way]) for way in order}, {}, facts=facts)
