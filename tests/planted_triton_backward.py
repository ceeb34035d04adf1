"""Bugs of the backward and of the mask scan for plant_triton_bugs.py, as planted_triton.py has the forward's."""

from __future__ import annotations

from planted_triton import Bug

BACKWARD, SCAN = "test_triton_attention_backward", "test_triton_mask_scan"
TILE, PASSES, ROWS = "attention_bwd_tile", "attention_bwd_passes", "attention_bwd_rows"
TO_THE_KEY = "masks_to_the_key"


def _bug(name: str, module: str, old: str, new: str, only: str, tests: list[str] | None = None) -> Bug:
    return Bug(name, module, old, new, only, tests or [BACKWARD])


BUGS = [
    _bug("backward: dS of the kept weights", TILE, "b_ds = b_p * (b_dp", "b_ds = b_kept * (b_dp", "features"),
    _bug(
        "backward: dP of what dropout dropped",
        TILE,
        "b_dp = tl.where(m_keep, b_dp",
        "b_dp = tl.where(m_keep | True, b_dp",
        "features",
    ),
    _bug("backward: slope of the softcap", TILE, "1.0 - b_tanh * b_tanh", "1.0 - b_tanh", "features"),
    _bug(
        "backward: dS of hidden keys",
        TILE,
        "        b_ds = tl.where(m_seen, b_ds, 0.0)\n",
        "",
        "hold_anything",
    ),
    _bug(
        "backward: the second half of a word", TILE, "column < 32", "column < 64", f"{TO_THE_KEY} and dense"
    ),
    _bug("backward: a tile's row", TILE, "+ o_i % GRANULE", "+ o_i * 0", f"{TO_THE_KEY} and dense"),
    _bug(
        "backward: columns past a chunk",
        TILE,
        "tl.static_range(0, WIDTH, CHUNK)",
        "tl.static_range(0, CHUNK, CHUNK)",
        "error_rule",
    ),
    _bug(
        "backward: the shift of extreme rows",
        TILE,
        " - across(b_shift, True, TRANSPOSED)",
        "",
        "lowest_finite",
    ),
    _bug("backward: logical places of keys", TILE, "b_places = b_k_pos", "b_places = b_k_pos * 0", "places"),
    _bug(
        "backward: query heads of a group",
        PASSES,
        "i_h = i_kv * group + g\n",
        "i_h = i_kv * group\n",
        "error_rule",
    ),
    _bug("backward: part of a granule", PASSES, "(e % (GRANULE // SIZE)).to(tl.int32)", "0", TO_THE_KEY),
    _bug(
        "backward: the end of a list under ranges",
        PASSES,
        "tl.cdiv(stop * SIZE, GRANULE)",
        "stop * SIZE // GRANULE",
        TO_THE_KEY,
    ),
    _bug(
        "backward: NaN of rows that see nothing",
        PASSES,
        '!= float("inf")\n                b_q',
        '!= float("nan")\n                b_q',
        "rows_that_see_nothing",
    ),
    _bug(
        "backward: NaN of keys that no row sees",
        PASSES,
        "b_k = tl.where(m_key[:, None], b_k, 0.0).to(b_k.dtype)",
        "b_k = b_k",
        "hidden_from_every_row",
    ),
    _bug("backward: keys past the last in a bias", PASSES, "acc += b_ds", "acc = b_ds", "bias_gradient"),
    _bug(
        "backward: heads that share a bias",
        PASSES,
        "n_h = map_h * 0, Hq",
        "n_h = map_h * 0, 1",
        "bias_gradient",
    ),
    _bug(
        "backward: rows seen whole",
        ROWS,
        "all_lo = tl.maximum(end - 1 - band_hi, lo)",
        "all_lo = tl.maximum(end - 2 - band_hi, lo)",
        "one_row_into",
    ),
    _bug("backward: rows whole by their extents", ROWS, "n_full == stop - start", "n_full > 0", TO_THE_KEY),
    _bug(
        "backward: extents past the first 128 blocks",
        ROWS,
        "tl.range(0, n_blocks, SCAN)",
        "tl.range(0, SCAN, SCAN)",
        "many_blocks",
    ),
    _bug(
        "backward: a sink's gate",
        ROWS,
        "b_gate = tl.exp(b_lse - b_gated)",
        "b_gate = tl.exp(b_gated - b_lse)",
        "features or lse_alone",
    ),
    _bug(
        "backward: the sinks' gradient",
        ROWS,
        "-tl.sum(tl.where(m_some, b_delta",
        "tl.sum(tl.where(m_some, b_delta",
        "features",
    ),
    _bug(
        "backward: the LSE's gradient under a tiny gate",
        ROWS,
        "b_gated = tl.where(tiny, b_lse + TINY_EXPONENT, b_gated)",
        "b_gated = b_gated",
        "lse_alone",
    ),
    _bug(
        "scan: whole at the ragged edge",
        "mask_scan",
        "tl.minimum(Sq - i_q * GRANULE, GRANULE) *",
        "GRANULE *",
        "",
        [SCAN],
    ),
    _bug("scan: tiles count from one", "mask_scan", "tiles[at] - 1, -1)", "tiles[at], -1)", "", [SCAN]),
    _bug("scan: the heads' planes", "mask_scan", "plane % H * head", "plane * head", "", [SCAN]),
    _bug("scan: a finite bias", "mask_scan", "(seen & (x != 0))", "(seen & (x > 0))", "", [SCAN]),
    _bug(
        "scan: offsets of a plane",
        "mask_scan",
        ".view(-1, 1) * n_q\n",
        ".view(-1, 1) * (n_q - 1)\n",
        "",
        [SCAN],
    ),
]
