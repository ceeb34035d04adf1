"""Bugs to plant in sm_80's attention forward, and in what the backward shares: tiles, softmax, masks."""

from . import Bug

PROGRAM, FLAGS, ARGUMENTS = "attention_check.cpp", ("-DFASTATTN_ONLY_FORWARD",), ()

FORWARD, TILE, MASK = "attention_sm80.cuh", "attention_tile.cuh", "attention_mask.cuh"
SCORE, SOFTMAX, LAYOUT = "attention_score.cuh", "online_softmax.cuh", "layout.h"

SYNC = "__syncthreads();"
TOP = "    cp_async_wait<0>();\n    __syncthreads();\n    const "
STAGED = "        cp_async_wait<0>();\n        __syncthreads();\n        if (ahead"

BUGS = [
    Bug("forward: no barrier before a tile is read", FORWARD, TOP, "    cp_async_wait<0>();\n    const "),
    Bug("forward: no wait for a tile", FORWARD, TOP, "    __syncthreads();\n    const "),
    Bug("forward: wait one group too lax", FORWARD, TOP, TOP.replace("<0>", "<1>")),
    Bug("forward: no wait for V", FORWARD, STAGED, "        __syncthreads();\n        if (ahead"),
    Bug(
        "forward: no barrier before K is overwritten",
        FORWARD,
        STAGED,
        "        cp_async_wait<0>();\n        if (ahead",
    ),
    Bug(
        "forward: no barrier after the ranges",
        FORWARD,
        "  cp_async_commit();\n  __syncthreads();\n",
        "  cp_async_commit();\n",
    ),
    Bug(
        "forward: no commit", FORWARD, "    cp_async_commit();\n\n    const int bits", "\n    const int bits"
    ),
    Bug("forward: stages do not alternate", FORWARD, "if (kStages == 2) stage ^= 1;", ""),
    Bug(
        "forward: next tile into the stage in use",
        FORWARD,
        "load_keys(ahead, stage ^ 1",
        "load_keys(ahead, stage",
    ),
    Bug(
        "forward: V of the next tile into the stage in use",
        FORWARD,
        "load_values(ahead, stage ^ 1",
        "load_values(ahead, stage",
    ),
    Bug(
        "forward: V of the wrong stage", FORWARD, "&smem.v[stage][first * kHead]", "&smem.v[0][first * kHead]"
    ),
    Bug(
        "forward: second half reads the first's keys",
        FORWARD,
        "&smem.k[stage][first * kHead]",
        "smem.k[stage]",
    ),
    Bug("forward: the other granule's bits", FORWARD, "warp < Tile::kWarps / 2 ?", "warp < Tile::kWarps ?"),
    Bug("forward: bits not shifted to the half", FORWARD, "r % kGranule] >> first", "r % kGranule]"),
    Bug("forward: bits not shifted to the lane", FORWARD, "return word >> my_col", "return word"),
    Bug("forward: bits of the wrong row", FORWARD, "kGranule + r % kGranule]", "kGranule + my_row]"),
    Bug("forward: lane's rows", FORWARD, "my_row = warp_row + lane / 4", "my_row = warp_row + lane % 8"),
    Bug(
        "forward: sums of the quad's lanes apart",
        FORWARD,
        "quad_sum(softmax.row_sum[t][half])",
        "softmax.row_sum[t][half]",
    ),
    Bug("forward: lse without the maximum", FORWARD, "peak + logf(sum)", "logf(sum)"),
    Bug("forward: dropout not scaled up", FORWARD, "factor *= a.dropout_scale", "factor *= 1.0f"),
    Bug("forward: sink the wrong way", FORWARD, "a.sinks[h] - lse", "lse - a.sinks[h]"),
    Bug("forward: output tail not guarded", FORWARD, "      if (row >= a.Sq) continue;\n", ""),
    Bug(
        "forward: early return before a barrier",
        FORWARD,
        "  KeyWalk<kForm, kGranules> walk(",
        "  if (m_first + my_row >= a.Sq) return;\n  KeyWalk<kForm, kGranules> walk(",
    ),
    Bug(
        "tile: lane map of B",
        TILE,
        "of_b(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8)",
        "of_b(lane % 16, lane / 16 * 8)",
    ),
    Bug(
        "tile: lane map of A",
        TILE,
        "of_a(row + lane % 16, lane / 16 * 8)",
        "of_a(row + lane / 2, lane % 2 * 8)",
    ),
    Bug(
        "tile: fragment order",
        TILE,
        "left[t][1] = pack<T>(p[t][n][2], p[t][n][3])",
        "left[t][1] = pack<T>(p[t][n + 1][0], p[t][n + 1][1])",
    ),
    Bug("tile: V not transposed", TILE, "ldmatrix_x4_trans(", "ldmatrix_x4("),
    Bug("tile: swizzle added, not turned", TILE, "(place_ ^ (col % kLine))", "(place_ + col % kLine)"),
    Bug("tile: read without swizzle", TILE, "place_(swizzle<kHead>(row, col))", "place_(row * kHead + col)"),
    Bug("tile: rows wanted not shifted", TILE, "  wanted >>= my_row;\n", ""),
    Bug("tile: columns past the head", TILE, "&& my_col + col < rows.columns;\n        cp", ";\n        cp"),
    Bug("tile: single elements past the head", TILE, "&& my_col + col + j < rows.columns", ""),
    Bug("tile: rows not advanced", TILE, "from += kPass * rows.stride", "from += 0"),
    Bug("tile: half of a row's lanes", TILE, "kHead % 64 == 0 ? 8 : 4, kPass", "4, kPass"),
    Bug("tile: pair stored in turn", TILE, "pack<T>(x, y)", "pack<T>(y, x)"),
    Bug("tile: no swizzle at all (bank conflicts)", LAYOUT, "(((col / 8) ^ turn) * 8)", "((col / 8) * 8)"),
    Bug(
        "softmax: sum not corrected", SOFTMAX, "row_sum[t][half] * correction + sum", "row_sum[t][half] + sum"
    ),
    Bug(
        "softmax: output not corrected",
        SOFTMAX,
        "warp_any(correction != 1.0f)",
        "warp_any(correction > 1.0f)",
    ),
    Bug("softmax: maximum of a lane alone", SOFTMAX, "peak = quad_max(peak);", ""),
    Bug("softmax: no pivot for unseen rows", SOFTMAX, "peak == -INFINITY ? 0.0f : peak", "peak"),
    Bug(
        "softmax: vote in a divergent branch",
        SOFTMAX,
        "if (warp_any(correction != 1.0f))",
        "if (correction != 1.0f && warp_any(true))",
    ),
    Bug("softmax: uninitialised sum", SOFTMAX, "row_sum[kRowTiles][2] = {}", "row_sum[kRowTiles][2]"),
    Bug("softmax: bits of a pair", SOFTMAX, "(word >> (n * 8) & 2)", "(word >> (n * 8) & 1)"),
    Bug("score: dropout rows", SCORE, "16 + at % 2 * 8, key", "16 + at % 2 * 4, key"),
    Bug("score: dropout of the pair", SCORE, "kept | keeps(second) << 1", "kept | kept << 1"),
    Bug("score: terms of the wrong tile", SCORE, "apply(s[t][0][i], t, n, i)", "apply(s[t][0][i], t, 0, i)"),
    Bug("score: tiles do not turn", SCORE, "s[t][m][i] = s[t][m + 1][i]", "s[t][m][i] = s[t][m][i]"),
    Bug("mask: edge tile taken for whole", MASK, "key + keys <= all_hi", "key <= all_hi"),
    Bug("mask: last tile missed", MASK, "key < seen_hi &&", "key + keys <= seen_hi &&"),
    Bug("mask: walk past the list", MASK, "at_[g] += here", "at_[g] += 1"),
    Bug("mask: half of a tile's columns", MASK, " | words[threadIdx.x % kWarp + kWarp]", ""),
    Bug(
        "mask: extents of half a warp",
        MASK,
        "lanes = 16; lanes > 0; lanes /= 2) {\n    x = join",
        "lanes = 8; lanes > 0; lanes /= 2) {\n    x = join",
    ),
    Bug("forward: places of 32 bits", FORWARD, "row * a.out.row", "int(row * a.out.row)"),
    Bug(
        "tile: places of 32 bits",
        TILE,
        "(first + my_row) * rows.stride",
        "int((first + my_row) * rows.stride)",
    ),
    Bug(
        "forward: bit tile of 32 bits", FORWARD, "int64_t(bits) * kGranule", "int(uint32_t(bits) * kGranule)"
    ),
    Bug("forward: sinks forgotten", FORWARD, "if (a.sinks) factor", "if (!a.sinks) factor"),
    Bug("forward: keys of the other batch", FORWARD, "k(a.k, smem.batch,", "k(a.k, 0,"),
    Bug(
        "mask: search goes one too far", MASK, "< granule) from = middle + 1", "<= granule) from = middle + 1"
    ),
    Bug("mask: lower bound of a range", MASK, "if (a.lo) r.lo = max(r.lo, ", "if (a.lo) r.lo = min(r.lo, "),
    Bug("score: counter of dropout by pairs", SCORE, "row, first / 4, words", "row, first / 2, words"),
]
