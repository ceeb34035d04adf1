"""Plain tensors as masks: scanned to ranges or bits, whatever their dtype, strides and broadcasting."""

import pytest
import torch
from mask_checks import additive, assert_well_formed, bools

from fastattn.masks import from_tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(130, 70), (3, 130, 70), (1, 130, 70), (2, 3, 130, 70), (2, 1, 130, 70), (2, 1, 1, 70), (130, 1)],
)
def test_tensor(shape, dtype, path):
    visible = bools(*shape, share=0.7)
    tensor = visible if dtype == torch.bool else additive(visible, dtype)
    lowered = from_tensor(tensor, 2, 3, 130, 70)
    assert_well_formed(lowered)
    assert lowered.bias is None
    assert torch.equal(lowered.to_dense(), visible.expand(2, 3, 130, 70))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_tensor_views(dtype, path):
    """Slices of larger masks, transposed and stepped ones, offsets that are no multiple of anything."""
    big = bools(3, 5, 400, 403)
    base = big if dtype == torch.bool else additive(big)
    views = [
        lambda t: t[1:3, 1:4, 13:143, 7:77],
        lambda t: t[:2, :3, ::3, 5:75][:, :, :130],
        lambda t: t[:2, 2:3, :130, 1:141:2].expand(2, 3, 130, 70),
        lambda t: t[0, 0, 3:73, 9:139].T,
        lambda t: t[:2, :1, :1, 11:81].expand(2, 3, 130, 70),
        lambda t: t[:1, :3, 40:170, 9:10].expand(2, 3, 130, 70),
        lambda t: t[1, 1, 1, 1].expand(130, 70),
        lambda t: t[:2, 0, 7, 3:73].unsqueeze(1).unsqueeze(1),
        lambda t: t.flip(3)[:2, :3, 1:131, 2:72],
        lambda t: t.permute(0, 1, 3, 2)[:2, 1:4, 100:230, 5:75],
    ]
    for view in views:
        lowered = from_tensor(view(base), 2, 3, 130, 70)
        assert_well_formed(lowered)
        assert torch.equal(lowered.to_dense(), view(big).expand(2, 3, 130, 70))


def test_stride_0_is_scanned_once(path):
    lowered = from_tensor(bools(130, 70).expand(4, 6, 130, 70), 4, 6, 130, 70)
    assert lowered.block_offsets.shape == (1, 1, 4)
    keys = (torch.arange(70) < 33).expand(4, 1, 130, 70)
    assert not from_tensor(keys, 4, 6, 130, 70).has_bits
    rows = bools(4, 1, 130, 1).expand(4, 6, 130, 70)
    assert not from_tensor(rows, 4, 6, 130, 70).has_bits


def test_additive_bias_is_kept(path):
    bias = torch.randn(2, 1, 130, 70)
    hidden = ~bools(130, 70, share=0.8)
    mixed = bias.masked_fill(hidden, float("-inf"))
    lowered = from_tensor(mixed, 2, 3, 130, 70)
    assert lowered.bias.shape == (2, 3, 130, 70)
    assert lowered.bias.stride(1) == 0
    assert lowered.bias.data_ptr() == mixed.data_ptr()
    assert torch.equal(lowered.to_dense(), (~hidden).expand(2, 3, 130, 70))
    plain = from_tensor(bias, 2, 3, 130, 70)
    assert plain.is_everything
    assert plain.bias is not None


def test_additive_special_values(path):
    tensor = torch.zeros(4, 70)
    tensor[1, 3] = torch.finfo(torch.float32).min
    lowered = from_tensor(tensor, 1, 1, 4, 70)
    assert lowered.is_everything, "finfo.min is a bias, not a mask"
    assert lowered.bias is not None
    for value in (float("nan"), float("inf"), 1e-38):
        tensor[1, 3] = value
        assert from_tensor(tensor, 1, 1, 4, 70).bias is not None
    assert from_tensor(-torch.zeros(4, 70), 1, 1, 4, 70).bias is None, "-0.0 adds nothing"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_instruction_set_scans_alike(isa, dtype):
    for S in ((64, 64), (130, 200), (65, 8400)):
        visible = bools(2, 1, *S, share=0.9)
        tensor = visible if dtype == torch.bool else additive(visible, dtype)
        for view in (lambda t: t, lambda t: t[..., 1:], lambda t: t[..., ::2], lambda t: t.mT):
            lowered = from_tensor(view(tensor), 2, 1, *view(tensor).shape[2:])
            assert_well_formed(lowered)
            assert torch.equal(lowered.to_dense(), view(visible))
            assert lowered.bias is None
    if dtype != torch.bool:
        for n, value in enumerate((1.0, float("nan"), float("inf"), torch.finfo(dtype).tiny)):
            tensor = torch.zeros(65, 300, dtype=dtype)
            tensor[3 * n, 299 - 17 * n] = value
            assert from_tensor(tensor, 1, 1, 65, 300).bias is not None
    # A bool that is stored as another number than 1 is true all the same.
    odd = torch.randint(0, 3, (70, 130), dtype=torch.uint8)
    assert torch.equal(from_tensor(odd.view(torch.bool), 1, 1, 70, 130).to_dense()[0, 0], odd != 0)


def test_scan_does_not_depend_on_threads(threads, task_order):
    mask = bools(3, 2, 400, 500, share=0.3)
    mask[1] = mask[0]
    results = []
    for count, order in ((1, 0), (2, 0), (3, 5), (5, 11), (7, 3)):
        threads(count)
        task_order(order)
        lowered = from_tensor(mask, 3, 2, 400, 500)
        results.append((lowered.block_offsets, lowered.block_list, lowered.bit_tiles))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def _patterns(Sk):
    j = torch.arange(Sk)
    cut, end = Sk // 3, Sk - Sk // 4
    yield "all", j >= 0, True
    yield "none", j < 0, True
    yield "prefix", j < cut, True
    yield "suffix", j >= cut, True
    yield "middle", (j >= cut) & (j < end), True
    yield "one key", j == Sk - 1, True
    if Sk > 2:
        yield "a hole", j != Sk // 2, False
        yield "the ends", (j == 0) | (j == Sk - 1), False


@pytest.mark.parametrize("Sk", [1, 2, 63, 64, 65, 128, 200, 64 * 129 + 7])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_without_rows_is_ranges_where_its_keys_are_an_interval(Sk, dtype, path):
    for name, seen, interval in _patterns(Sk):
        lowest = 0.0 if dtype == torch.bool else torch.finfo(dtype).min
        for finite in (0.0, -0.0, 1.5, lowest, float("nan")):
            planes = torch.stack([seen, torch.ones(Sk, dtype=torch.bool)])[:, None, None]
            if dtype != torch.bool:
                planes = torch.zeros(planes.shape, dtype=dtype).masked_fill_(~planes, float("-inf"))
                planes[1, 0, 0, 0] = finite
            spread = torch.zeros(2, 1, 1, 2 * Sk, dtype=dtype)[..., ::2].copy_(planes)
            for tensor in (planes, spread, planes.expand(2, 3, 1, Sk)):
                m = from_tensor(tensor, 2, 3, 70, Sk)
                wanted = (tensor if dtype == torch.bool else tensor != float("-inf")).expand(2, 3, 70, Sk)
                assert torch.equal(m.to_dense(), wanted), name
                assert m.has_bits != interval, name
                if name == "all" and Sk > 1:
                    assert m.is_everything
                assert (m.bias is not None) == (dtype != torch.bool and finite != 0), name
            if dtype == torch.bool:
                break


def test_learned_bias_is_kept_at_zero():
    tensor = additive(bools(130, 70)).requires_grad_()
    lowered = from_tensor(tensor, 1, 1, 130, 70)
    assert lowered.bias.requires_grad
    assert lowered.has_bits


def test_rank_3_is_heads_when_batch_equals_heads():
    mask = bools(3, 8, 8)
    assert torch.equal(from_tensor(mask, 3, 3, 8, 8).to_dense()[0], mask)
