"""Bugs to plant in the row kernels: softmax and the norms, there and back."""

from . import Bug

PROGRAM, FLAGS = "rows_check.cpp", ()
ARGUMENTS = ("24x70", "45x40", "264x72", "1029x6", "8208x6", "16408x4", "far")
ARGUMENTS_TSAN = ("24x6", "1029x2")

ROWS, SUMS = "rows.cuh", "column_sums.cuh"
SOFTMAX, SOFTMAX_BACKWARD = "softmax.cuh", "softmax_backward.cuh"
NORM, NORM_BACKWARD = "norm.cuh", "norm_backward.cuh"
LOOPED, COLUMNS, BIAS = "_looped(", "_columns(", "softmax_backward_bias("
LOAD, STORE = "void load_pack(", "void store_pack("
REDUCED = "  team.reduce(sums, Add{});\n"
SYNC = "  __syncthreads();\n"

BUGS = [
    # What all share: reductions, packs, the lanes' exchange.
    Bug("reduce: no barrier before the warps' values are read", ROWS, "      __syncthreads();\n", ""),
    Bug("reduce: one set of slots", ROWS, "      turn_ ^= 1;\n", ""),
    Bug("reduce: slots of warps that are not there", ROWS, "slot[k][lane & (warps - 1)]", "slot[k][lane]"),
    Bug(
        "reduce: odd warps in an order of their own",
        ROWS,
        "offset /= 2) combine(value, op, offset);\n    }",
        "offset /= 2)\n        combine(value, op, threadIdx.x / 32 % 2 ? warps / 2 / offset : offset);\n    }",
    ),
    Bug("reduce: half of the lanes", ROWS, "offset = kGroup / 2", "offset = kGroup / 4"),
    Bug("reduce: half of the warps", ROWS, "offset = warps / 2", "offset = warps / 4"),
    Bug("reduce: every lane writes the slot", ROWS, "      if (lane == 0) {\n", "      if (lane >= 0) {\n"),
    Bug(
        "pack: columns of another thread",
        ROWS,
        "(p * team.threads() + team.thread())",
        "(p + team.thread() * 2)",
    ),
    Bug("pack: halves of a word", ROWS, "e % 2 * 16", "e % 1 * 16"),
    Bug("pack: stored in turn", ROWS, "pack<T>(x[2 * w], x[2 * w + 1])", "pack<T>(x[2 * w + 1], x[2 * w])"),
    Bug("load: past the row's end", ROWS, "    if (column < limit) load", "    load"),
    Bug(
        "load: past the row's end, by elements",
        ROWS,
        "base + c < limit ? row[base + c] : T{}",
        "row[base + c]",
    ),
    Bug(
        "load: no barrier before the exchange is written", ROWS, "    __syncwarp();\n#pragma", "#pragma", LOAD
    ),
    Bug(
        "load: no barrier before the exchange is read", ROWS, "    __syncwarp();\n    load", "    load", LOAD
    ),
    Bug(
        "load: one exchange for a warp's teams",
        ROWS,
        "kGroup * (kStageBytes / 32 * kGroup)",
        "32 * kStageBytes",
    ),
    Bug("load: elements of a whole warp", ROWS, "e * Team<kLanes>::kGroup + lane", "e * 32 + lane", LOAD),
    Bug("store: past the row's end", ROWS, "    if (column < width) store", "    store"),
    Bug("store: past the row's end, by elements", ROWS, "      if (base + c < width) row", "      row"),
    Bug(
        "store: no barrier before the exchange is written",
        ROWS,
        "    __syncwarp();\n    store",
        "    store",
        STORE,
    ),
    Bug(
        "store: no barrier before the exchange is read", ROWS, "    __syncwarp();\n#pragma", "#pragma", STORE
    ),
    # Softmax.
    Bug("softmax: maximum of a thread alone", SOFTMAX, "  top = team.reduce_one(top, Max{});\n", ""),
    Bug("softmax: sum of a thread alone", SOFTMAX, "team.reduce_one(sum, Add{})", "sum"),
    Bug("softmax: diagonal of causal hidden", SOFTMAX, "a.grid.dims - 1] + 1,", "a.grid.dims - 1],"),
    Bug("softmax: mask's bits of the first pack", SOFTMAX, "== 0.f) << (p * kPack + e) % 32", "== 0.f) << e"),
    Bug("softmax: bias of -inf does not hide", SOFTMAX, "uint32_t(b[p][e] < -kLargest)", "uint32_t(0)"),
    Bug("softmax: idle teams write", SOFTMAX, "row <= last ? int(a.width) : 0", "int(a.width)"),
    Bug("softmax: a team alone at the vote", SOFTMAX, "team.some(empty)", "empty"),
    Bug(
        "softmax: places of 32 bits",
        SOFTMAX,
        "a.grid.offset(a.x.stride, row))",
        "int(a.grid.offset(a.x.stride, row)))",
    ),
    Bug("looped: sum not corrected", SOFTMAX, "    sum *= weight_of(top, pivot);\n", "", LOOPED),
    Bug("looped: a thread's stale maximum", SOFTMAX, "sum * weight_of(top, pivot), Add", "sum, Add", LOOPED),
    Bug(
        "looped: hidden end not written",
        SOFTMAX,
        "first < width; first",
        "first < scores.seen(); first",
        LOOPED,
    ),
    Bug("columns: no barrier before the sums", SOFTMAX, SYNC, "", COLUMNS),
    Bug("columns: a warp's stale maximum", SOFTMAX, " * weight_of(shared.top[w][lane], pivot)", "", COLUMNS),
    Bug(
        "columns: what other warps have seen",
        SOFTMAX,
        "visible |= shared.visible[w][lane] != 0;",
        "",
        COLUMNS,
    ),
    Bug(
        "columns: last block's idle lanes",
        SOFTMAX,
        "row = smaller(given, a.grid.rows - 1)",
        "row = given",
        COLUMNS,
    ),
    Bug("columns: places of 32 bits", SOFTMAX, "column * a.x.column", "int(column * a.x.column)", COLUMNS),
    # Its backward.
    Bug(
        "softmax backward: dot of a thread alone",
        SOFTMAX_BACKWARD,
        "  dot = team.reduce_one(dot, Add{});\n",
        "",
    ),
    Bug("softmax backward: idle teams write", SOFTMAX_BACKWARD, "given == row ? width : 0", "width"),
    Bug("softmax backward: a stale dot", SOFTMAX_BACKWARD, "- a.dots[row]", "- a.dots[begin]", BIAS),
    Bug(
        "softmax backward: rows that do not divide",
        SOFTMAX_BACKWARD,
        "bias_row * a.shared + (part + 1) * a.shared / a.split",
        "begin + a.shared / a.split",
    ),
    Bug(
        "softmax backward: parts of one bias row",
        SOFTMAX_BACKWARD,
        "parts[task * a.width",
        "parts[part * a.width",
    ),
    Bug("softmax backward columns: no barrier", SOFTMAX_BACKWARD, SYNC, "", COLUMNS),
    Bug(
        "softmax backward columns: one warp's dots",
        SOFTMAX_BACKWARD,
        "shared.dot[w][lane]",
        "shared.dot[0][lane]",
    ),
    Bug(
        "softmax backward columns: places of 32 bits",
        SOFTMAX_BACKWARD,
        "to_float(y[column * a.y.column])",
        "to_float(y[int(column * a.y.column)])",
    ),
    # Sums of columns.
    Bug("column sums: no barrier", SUMS, SYNC, ""),
    Bug(
        "column sums: parts that do not divide",
        SUMS,
        "p < (warp + 1) * a.count / kSumWarps",
        "p < warp * a.count / kSumWarps + a.count / kSumWarps",
    ),
    Bug("column sums: past the end", SUMS, "if (warp != 0 || column >= a.width)", "if (warp != 0)"),
    Bug(
        "column sums: first group's parts",
        SUMS,
        "a.parts + group * a.count * a.width + column",
        "a.parts + column",
    ),
    # The norms.
    Bug(
        "norm: mean of a thread alone",
        NORM,
        "team.reduce_one(sum_of(team, h, 0, width, power), Add{}) * inverse",
        "sum_of(team, h, 0, width, power) * inverse",
    ),
    Bug("norm: squares around 0", NORM, "    if (!a.rms) pivot = ", "    if (a.rms) pivot = "),
    Bug(
        "norm: the end of the row counts",
        NORM,
        "column + e < width ? fmaf(h[p][e], power, -pivot) : 0.f",
        "fmaf(h[p][e], power, -pivot)",
    ),
    Bug("norm: what rounding left of the mean", NORM, " - s.mean) - s.rest)", " - s.mean))"),
    Bug("norm: the rest is not kept", NORM, "s.power == 1.f ? s.rest : 0.f", "0.f"),
    Bug("norm: statistics of the scaled row", NORM, "s.rstd * s.power;", "s.rstd;"),
    Bug("norm: a team alone at the vote", NORM, "if (team.some(tame))", "if (tame)"),
    Bug(
        "norm: the others of a warp are scaled too",
        NORM,
        "power = tame ? other : 1.f;",
        "power = other * 2.f;",
    ),
    Bug(
        "norm: sum not as it is stored",
        NORM,
        "rounded(h[p][e] + r[p][e], a.sum.storage)",
        "h[p][e] + r[p][e]",
    ),
    Bug("norm: idle teams write the sum", NORM, "width, given == row, h)", "width, true, h)"),
    Bug("norm: idle teams write", NORM, "given == row ? width : 0, h", "width, h"),
    Bug("norm: offset of the weight", NORM, "v *= w + offset;", "v *= w;"),
    Bug(
        "norm: places of 32 bits",
        NORM,
        "a.grid.offset(a.y.stride, row)",
        "int(a.grid.offset(a.y.stride, row))",
    ),
    Bug("norm looped: mean of the whole row", NORM, "/ float(step)", "* inverse", LOOPED),
    Bug("norm looped: stale packs", NORM, "    load(first);\n    normalise", "    normalise", LOOPED),
    # Their backward.
    Bug("norm backward: no barrier between the teams' sums", NORM_BACKWARD, "      __syncthreads();\n", ""),
    Bug(
        "norm backward: the last team's sums",
        NORM_BACKWARD,
        "t < team.count(); ++t",
        "t < team.count() - 1; ++t",
    ),
    Bug(
        "norm backward: merge where lanes exchange",
        NORM_BACKWARD,
        "(exchange ? int(blockDim.x) / 32 * kStageBytes : 0)",
        "0",
    ),
    Bug("norm backward: idle teams count", NORM_BACKWARD, "    if (given == row) {\n", "    {\n"),
    Bug(
        "norm backward: rows that do not divide",
        NORM_BACKWARD,
        "end = (group + 1) * a.grid.rows / groups",
        "end = begin + a.grid.rows / groups",
    ),
    Bug("norm backward: the mean in RMSNorm", NORM_BACKWARD, "a.rms ? 0.f : sums[0]", "sums[0]"),
    Bug("norm backward: sums of a thread alone", NORM_BACKWARD, "    team.reduce(sums, Add{});\n", ""),
    Bug(
        "norm backward: the gradient that reached the sum",
        NORM_BACKWARD,
        "n[p][e] += d[e];",
        "n[p][e] += 0.f * d[e];",
    ),
    Bug(
        "norm backward: places of 32 bits",
        NORM_BACKWARD,
        "a.grid.offset(a.h.stride, row)",
        "int(a.grid.offset(a.h.stride, row))",
    ),
    Bug("norm backward looped: sums of a thread alone", NORM_BACKWARD, REDUCED, "", LOOPED),
    Bug(
        "norm backward looped: g without its weight",
        NORM_BACKWARD,
        "    weigh(a, team, first, g);\n    store",
        "    store",
        LOOPED,
    ),
    Bug(
        "norm backward columns: stale statistics",
        NORM_BACKWARD,
        "stats_of(a, row), first",
        "stats_of(a, group * a.grid.rows / groups), first",
    ),
    Bug("norm backward columns: past the end", NORM_BACKWARD, "    if (column + e >= a.width) break;\n", ""),
    Bug(
        "norm backward columns: group's first rows",
        NORM_BACKWARD,
        "row = group * a.grid.rows / groups; row <",
        "row = group; row <",
        COLUMNS,
    ),
]
