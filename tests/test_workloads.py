"""The workload tables: the rows' masks, work and names, and the calls that `cases` builds of them."""

import dataclasses

import pytest
import torch

from fastattn.tools import cases, workloads
from fastattn.tools.families import FAMILIES, AttentionShape, granule_fraction

SMALL = [
    AttentionShape(2, 4, 70, 8, hkv=2),
    AttentionShape(1, 2, 37, 8, sk=150),
    AttentionShape(3, 1, 150, 8, sk=37),
    AttentionShape(1, 1, 1, 8),
]
EVERY_ROW = [row for suite in workloads.SUITES.values() for row in suite.rows] + workloads.verify_rows()


def brute_pairs(family, shape):
    dense = family.dense(shape)
    if dense is None:
        return shape.b * shape.hq * shape.sq * shape.sk
    return int(dense.expand(shape.b, shape.hq, shape.sq, shape.sk).sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_visible_pairs_are_those_of_the_dense_mask(name):
    for shape in SMALL:
        assert FAMILIES[name].visible_pairs(shape) == brute_pairs(FAMILIES[name], shape), shape


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "none"])
def test_a_family_is_the_same_mask_written_twice(name):
    for shape in SMALL:
        dense = FAMILIES[name].dense(shape).expand(shape.b, shape.hq, shape.sq, shape.sk)
        algebra = FAMILIES[name].mask(shape).to_dense(shape.sq, shape.sk, shape.b, shape.hq)
        assert torch.equal(dense, algebra), shape


def test_granule_fraction_counts_blocks_with_anything_in_them():
    dense = torch.zeros(130, 200, dtype=torch.bool)
    assert granule_fraction(dense, 130, 200) == 0
    dense[129, 199] = dense[0, 63] = True
    assert granule_fraction(dense, 130, 200) == pytest.approx(2 / 12)
    assert FAMILIES["causal"].granule_fraction(AttentionShape(1, 1, 256, 8)) == pytest.approx(10 / 16)


def test_padding_hides_its_share_on_average():
    for percent in (25, 50, 75):
        for batch in (1, 8):
            shape = AttentionShape(batch, 1, 1024, 8)
            hidden = 1 - FAMILIES[f"padding{percent}"].visible_pairs(shape) / (batch * 1024 * 1024)
            assert hidden == pytest.approx(percent / 100, abs=0.01)


def loop_flops(row):
    """Multiply-adds of a naive attention, counted one at a time."""
    shape, flops = row.shape, 0
    dense = FAMILIES[row.mask].dense(shape)
    for b in range(shape.b):
        for h in range(shape.hq):
            for i in range(shape.sq):
                for j in range(shape.sk):
                    seen = dense is None or dense.expand(shape.b, shape.hq, shape.sq, shape.sk)[b, h, i, j]
                    flops += 2 * (shape.d + shape.dv) if seen else 0
    return flops


@pytest.mark.parametrize("name", ["none", "causal", "padding50", "window16", "blocks25"])
def test_flops_are_visible_multiply_adds(name):
    row = workloads.Workload("x", "attention", "bf16", AttentionShape(2, 2, 20, 8, hkv=1, sk=30, dv=12), name)
    assert row.unit == "flops"
    assert row.ceiling == "bf16"
    assert row.work == loop_flops(row)
    assert dataclasses.replace(row, training=True).work == 3.5 * row.work


def test_flops_of_the_plain_square_are_four_b_h_s_s_d():
    row = workloads.Workload("x", "attention", "fp32", AttentionShape(8, 12, 512, 64))
    assert row.work == 4 * 8 * 12 * 512 * 512 * 64


def test_decode_counts_visible_keys_and_values_once_a_group():
    shape = AttentionShape(4, 32, 1, 128, hkv=8, sk=4096)
    row = workloads.Workload("x", "attention", "bf16", shape, features=("decode",))
    assert (row.unit, row.ceiling) == ("bytes", "read")
    assert row.work == 2 * (4 * 8 * 4096 * 128) * 2
    assert dataclasses.replace(row, mask="padding50").work == pytest.approx(row.work / 2)


@pytest.mark.parametrize(
    ("op", "tensors", "vectors"),
    [
        ("softmax", 2, 0),
        ("layer_norm", 2, 2),
        ("rms_norm", 2, 1),
        ("add_layer_norm", 4, 2),
        ("add_rms_norm", 4, 1),
    ],
)
def test_bytes_of_row_operations(op, tensors, vectors):
    row = workloads.Workload("x", op, "bf16", workloads.RowShape(10, 7))
    assert row.work == 2 * (tensors * 70 + vectors * 7)
    assert row.ceiling == "copy"


def test_names_are_unique_and_every_row_says_what_it_costs():
    for suite in [*(suite.rows for suite in workloads.SUITES.values()), workloads.verify_rows()]:
        names = [row.name for row in suite]
        assert len(set(names)) == len(names)
    for row in EVERY_ROW:
        assert row.dtype in workloads.DTYPES
        assert set(row.features) <= set(workloads.FEATURES)
        assert all(limit.floor > 0 for limit in row.limits)


def test_suites_have_rows_and_a_quick_form_or_say_why_not():
    for suite in workloads.SUITES.values():
        quick = workloads.select(suite.name, quick=True)
        assert suite.rows
        assert bool(quick) == bool(suite.rows)
        assert len(quick) < max(len(suite.rows), 1)


def test_only_matches_parts_and_patterns():
    assert all("causal" in row.name for row in workloads.select("cpu-forward", only="causal"))
    assert [row.name for row in workloads.select("cpu-forward", only="fp32-*latency")] == [
        "fp32-b1-h1-s1-d64-none-latency"
    ]
    assert workloads.select("cpu-forward", only="nothing like it") == []


def test_verify_covers_every_op_dtype_and_mask():
    rows = workloads.verify_rows()
    assert {row.op for row in rows} == {"attention", *workloads.ROW_TRAFFIC}
    assert {row.mask for row in rows} >= set(workloads.VERIFY_MASKS)
    assert {row.spelling for row in rows} == {"flag", "object", "bool", "additive", "prepared"}
    for dtype in ("fp32", "bf16", "fp16"):
        assert {row.shape for row in rows if row.dtype == dtype} == {row.shape for row in rows}
    assert len(workloads.verify_rows(quick=True)) < len(rows) / 3


def test_cases_give_both_sides_the_same_numbers():
    row = workloads.Workload(
        "x", "attention", "fp32", AttentionShape(2, 4, 33, 16, hkv=2), "padding50", "bool"
    )
    case = cases.build(row)
    torch.testing.assert_close(case.variants["ours"](), case.variants["torch"]())
    again = cases.build(row)
    assert torch.equal(case.inputs["q"], again.inputs["q"])


def test_what_this_version_lacks_is_not_available():
    with pytest.raises(cases.NotAvailable, match=r"fastattn\.no_such_thing is not in this version"):
        cases.library("no_such_thing")


@pytest.mark.parametrize(
    "op, training", [("mha", False), ("encoder", False), ("encoder-layer", False), ("encoder-layer", True)]
)
def test_module_rows_compute_the_same(op, training):
    """Every variant of a row of the suite `modules`, on a small shape: the same numbers where padding is none."""
    shape = AttentionShape(4, 2, 12, 8)
    row = workloads.Workload("modules", op, "fp32", shape, "padding50", "bool", training=training)
    assert row.unit == "flops" and row.work > 0
    case = cases.build(row)
    if training:
        for module in (case.inputs["ours"], case.inputs["theirs"]):
            module.eval()  # without dropout, which draws differently
    with torch.set_grad_enabled(training):
        expected, results = case.variants["torch"](), {name: call() for name, call in case.variants.items()}
    real = ~case.inputs["padding"]
    for name, result in results.items():
        if training:
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(
                    a, b, atol=1e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
                )
        else:
            torch.testing.assert_close(result[real], expected[real], atol=1e-4, rtol=1e-3)
