"""Bugs to plant in sm_80's attention backward: the passes over rows, queries, keys and score terms."""

from . import Bug

PROGRAM, FLAGS, ARGUMENTS = "attention_check.cpp", (), ()

BACKWARD, ROWS = "attention_bwd_sm80.cuh", "attention_bwd_rows.cuh"
TERMS, MASK = "attention_bwd_bias.cuh", "attention_mask.cuh"

TOP = "    cp_async_wait<0>();\n    __syncthreads();\n    const "
QUERIES, KEYS = "attention_bwd_queries(", "attention_bwd_keys("

BUGS = [
    Bug("mask: one head of a group", MASK, "if (++h_ >= h_end_)", "if (++h_)"),
    Bug("mask: band of rows", MASK, "max(key_ - a_.band_hi, 0)", "max(key_ + kGranule, 0)"),
    Bug(
        "queries: no barrier before a tile is read",
        BACKWARD,
        TOP,
        "    cp_async_wait<0>();\n    const ",
        QUERIES,
    ),
    Bug("queries: no wait for a tile", BACKWARD, TOP, "    __syncthreads();\n    const ", QUERIES),
    Bug(
        "queries: the only stage filled too early",
        BACKWARD,
        "else __syncthreads();  // before",
        "// before",
        QUERIES,
    ),
    Bug(
        "queries: next tile into the stage in use",
        BACKWARD,
        "load_keys(ahead, stage ^ 1)",
        "load_keys(ahead, stage)",
        QUERIES,
    ),
    Bug("queries: dQ not scaled", BACKWARD, "a.D, dq, a.scale", "a.D, dq, 1.0f", QUERIES),
    Bug("keys: no barrier before a tile is read", BACKWARD, TOP, "    cp_async_wait<0>();\n    const ", KEYS),
    Bug("keys: no wait for a tile", BACKWARD, TOP, "    __syncthreads();\n    const ", KEYS),
    Bug(
        "keys: the only stage filled too early",
        BACKWARD,
        "else __syncthreads();  // before",
        "// before",
        KEYS,
    ),
    Bug(
        "keys: statistics of the wrong stage",
        BACKWARD,
        "smem.delta[stage][row] =",
        "smem.delta[0][row] =",
        KEYS,
    ),
    Bug("keys: words of the wrong stage", BACKWARD, "smem.words[stage][row] =", "smem.words[0][row] =", KEYS),
    Bug(
        "keys: no commit",
        BACKWARD,
        "first, rows);\n    cp_async_commit();\n    if (threadIdx",
        "first, rows);\n    if (threadIdx",
        KEYS,
    ),
    Bug(
        "keys: columns of the first group",
        BACKWARD,
        "multiply_rounded<kHead>(dk, dp, &smem.q[stage][first * kHead], column)",
        "multiply_rounded<kHead>(dk, dp, &smem.q[stage][first * kHead], 0)",
        KEYS,
    ),
    Bug("keys: output tail not guarded", BACKWARD, "    if (row + half * 8 >= limit) continue;\n", ""),
    Bug(
        "gradient: hidden scores count",
        BACKWARD,
        "  if (!seen) return {0.0f, 0.0f, 0.0f};\n",
        "  (void)seen;\n",
    ),
    Bug("gradient: softcap's slope forgotten", BACKWARD, "ds * cap_slope", "ds"),
    Bug(
        "gradient: dropped dP counts",
        BACKWARD,
        "dp = kept ? dp * a.dropout_scale : 0.0f",
        "dp = dp * a.dropout_scale",
    ),
    Bug(
        "rows: no barrier before the extents",
        ROWS,
        "  __syncthreads();\n  if (thread == 0) {\n    const Extent",
        "  if (thread == 0) {\n    const Extent",
    ),
    Bug("rows: half of the extents", ROWS, "join(smem.extent[0], smem.extent[1])", "smem.extent[0]"),
    Bug("rows: sum over half a warp", ROWS, "lanes = 16;", "lanes = 8;"),
    Bug(
        "sinks: no barrier before the sums",
        ROWS,
        "  __syncthreads();\n  if (thread == 0) a.dsinks",
        "  if (thread == 0) a.dsinks",
    ),
    Bug(
        "terms: no barrier before the tiles are filled",
        TERMS,
        "        __syncthreads();  // the tiles before",
        "        // the tiles before",
    ),
    Bug("terms: no wait", TERMS, "        cp_async_wait<0>();\n", ""),
    Bug(
        "terms: no barrier before the tiles are read",
        TERMS,
        "        cp_async_wait<0>();\n        __syncthreads();\n",
        "        cp_async_wait<0>();\n",
    ),
    Bug("terms: no barrier before the sums", TERMS, "    }\n    __syncthreads();\n#pragma", "    }\n#pragma"),
    Bug("terms: a lane alone", TERMS, "lanes = 4; lanes < kWarp", "lanes = 8; lanes < kWarp"),
    Bug(
        "queries: bits not shifted to the half", BACKWARD, "kGranule + r] >> first", "kGranule + r]", QUERIES
    ),
    Bug(
        "keys: rows that see nothing are read",
        BACKWARD,
        "a.Sq && a.exponent[statistics + row] < INFINITY",
        "a.Sq",
        KEYS,
    ),
    Bug(
        "keys: the warp's keys of the word",
        BACKWARD,
        "(&smem.words[stage][at])[warp]",
        "(&smem.words[stage][at])[0]",
        KEYS,
    ),
    Bug("keys: places of 32 bits", BACKWARD, "(row + half * 8) * to.row", "int((row + half * 8) * to.row)"),
    Bug("rows: places of 32 bits", ROWS, "row * a.dout.row", "int(row * a.dout.row)"),
    Bug("rows: dlse of the sum with the sink", ROWS, "a.dlse[at] * expf(exponent - lse);", "a.dlse[at];"),
    Bug("rows: a far sink's weight overflows", ROWS, "if (exponent > lse + kFarthest)", "if (false)"),
    Bug(
        "rows: a sink's term of the nearer exponent",
        ROWS,
        "expf(a.sinks[h] - exponent) * delta",
        "expf(a.sinks[h] - lse) * delta",
    ),
    Bug("sinks: sum of a thread alone", ROWS, "  sum = warp_sum(sum);", ""),
    Bug("terms: granules that are not listed", TERMS, "if (bits == kHidden) continue;", ""),
]
