"""Plants one bug at a time in the sm_80 attention kernels and reports which are not noticed.

  python tests/twin/plant_bugs.py [--bugs NAME_START ...] [--no-tsan] [--write]

Each bug is a change of the text of csrc/cuda in a copy of the tree. `attention_check.cpp`, built plainly, runs under
six schedules; what it does not notice is run once more under ThreadSanitizer. `--write` writes planted_bugs.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TWIN = Path(__file__).resolve().parent
ROOT = TWIN.parents[1]
SCHEDULES = range(6)

FORWARD, BACKWARD, ROWS = "attention_sm80", "attention_bwd_sm80", "attention_bwd_rows"
TERMS, TILE, MASK, SCORE, SOFTMAX = (
    "attention_bwd_bias",
    "attention_tile",
    "attention_mask",
    "attention_score",
    "online_softmax",
)
SYNC = "__syncthreads();"
TOP = "    cp_async_wait<0>();\n    __syncthreads();\n    const "
STAGED = "        cp_async_wait<0>();\n        __syncthreads();\n        if (ahead"
QUERIES, KEYS = "attention_bwd_queries(", "attention_bwd_keys("

# name, header, old text, new text[, the function it stands behind]
BUGS = [
    ("control: no bug", FORWARD, SYNC, SYNC),
    ("forward: no barrier before a tile is read", FORWARD, TOP, "    cp_async_wait<0>();\n    const "),
    ("forward: no wait for a tile", FORWARD, TOP, "    __syncthreads();\n    const "),
    ("forward: wait one group too lax", FORWARD, TOP, TOP.replace("<0>", "<1>")),
    ("forward: no wait for V", FORWARD, STAGED, "        __syncthreads();\n        if (ahead"),
    (
        "forward: no barrier before K is overwritten",
        FORWARD,
        STAGED,
        "        cp_async_wait<0>();\n        if (ahead",
    ),
    (
        "forward: no barrier after the ranges",
        FORWARD,
        "  cp_async_commit();\n  __syncthreads();\n",
        "  cp_async_commit();\n",
    ),
    ("forward: no commit", FORWARD, "    cp_async_commit();\n\n    const int bits", "\n    const int bits"),
    ("forward: stages do not alternate", FORWARD, "if (kStages == 2) stage ^= 1;", ""),
    (
        "forward: next tile into the stage in use",
        FORWARD,
        "load_keys(ahead, stage ^ 1",
        "load_keys(ahead, stage",
    ),
    (
        "forward: V of the next tile into the stage in use",
        FORWARD,
        "load_values(ahead, stage ^ 1",
        "load_values(ahead, stage",
    ),
    ("forward: V of the wrong stage", FORWARD, "&smem.v[stage][first * kHead]", "&smem.v[0][first * kHead]"),
    (
        "forward: second half reads the first's keys",
        FORWARD,
        "&smem.k[stage][first * kHead]",
        "smem.k[stage]",
    ),
    ("forward: the other granule's bits", FORWARD, "warp < Tile::kWarps / 2 ?", "warp < Tile::kWarps ?"),
    ("forward: bits not shifted to the half", FORWARD, "r % kGranule] >> first", "r % kGranule]"),
    ("forward: bits not shifted to the lane", FORWARD, "return word >> my_col", "return word"),
    ("forward: bits of the wrong row", FORWARD, "kGranule + r % kGranule]", "kGranule + my_row]"),
    ("forward: lane's rows", FORWARD, "my_row = warp_row + lane / 4", "my_row = warp_row + lane % 8"),
    (
        "forward: sums of the quad's lanes apart",
        FORWARD,
        "quad_sum(softmax.row_sum[t][half])",
        "softmax.row_sum[t][half]",
    ),
    ("forward: lse without the maximum", FORWARD, "peak + logf(sum)", "logf(sum)"),
    ("forward: dropout not scaled up", FORWARD, "factor *= a.dropout_scale", "factor *= 1.0f"),
    ("forward: sink the wrong way", FORWARD, "a.sinks[h] - lse", "lse - a.sinks[h]"),
    ("forward: output tail not guarded", FORWARD, "      if (row >= a.Sq) continue;\n", ""),
    (
        "forward: early return before a barrier",
        FORWARD,
        "  KeyWalk<kForm, kGranules> walk(",
        "  if (m_first + my_row >= a.Sq) return;\n  KeyWalk<kForm, kGranules> walk(",
    ),
    (
        "tile: lane map of B",
        TILE,
        "of_b(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8)",
        "of_b(lane % 16, lane / 16 * 8)",
    ),
    (
        "tile: lane map of A",
        TILE,
        "of_a(row + lane % 16, lane / 16 * 8)",
        "of_a(row + lane / 2, lane % 2 * 8)",
    ),
    (
        "tile: fragment order",
        TILE,
        "left[t][1] = pack<T>(p[t][n][2], p[t][n][3])",
        "left[t][1] = pack<T>(p[t][n + 1][0], p[t][n + 1][1])",
    ),
    ("tile: V not transposed", TILE, "ldmatrix_x4_trans(", "ldmatrix_x4("),
    ("tile: swizzle added, not turned", TILE, "(place_ ^ (col % kLine))", "(place_ + col % kLine)"),
    ("tile: read without swizzle", TILE, "place_(swizzle<kHead>(row, col))", "place_(row * kHead + col)"),
    ("tile: rows wanted not shifted", TILE, "  wanted >>= my_row;\n", ""),
    ("tile: columns past the head", TILE, "&& my_col + col < rows.columns;\n        cp", ";\n        cp"),
    ("tile: single elements past the head", TILE, "&& my_col + col + j < rows.columns", ""),
    ("tile: rows not advanced", TILE, "from += kPass * rows.stride", "from += 0"),
    ("tile: half of a row's lanes", TILE, "kHead % 64 == 0 ? 8 : 4, kPass", "4, kPass"),
    ("tile: pair stored in turn", TILE, "pack<T>(x, y)", "pack<T>(y, x)"),
    ("tile: no swizzle at all (bank conflicts)", "layout", "(((col / 8) ^ turn) * 8)", "((col / 8) * 8)"),
    ("softmax: sum not corrected", SOFTMAX, "row_sum[t][half] * correction + sum", "row_sum[t][half] + sum"),
    ("softmax: output not corrected", SOFTMAX, "warp_any(correction != 1.0f)", "warp_any(correction > 1.0f)"),
    ("softmax: maximum of a lane alone", SOFTMAX, "peak = quad_max(peak);", ""),
    ("softmax: no pivot for unseen rows", SOFTMAX, "peak == -INFINITY ? 0.0f : peak", "peak"),
    (
        "softmax: vote in a divergent branch",
        SOFTMAX,
        "if (warp_any(correction != 1.0f))",
        "if (correction != 1.0f && warp_any(true))",
    ),
    ("softmax: uninitialised sum", SOFTMAX, "row_sum[kRowTiles][2] = {}", "row_sum[kRowTiles][2]"),
    ("softmax: bits of a pair", SOFTMAX, "(word >> (n * 8) & 2)", "(word >> (n * 8) & 1)"),
    ("score: dropout rows", SCORE, "16 + at % 2 * 8, key", "16 + at % 2 * 4, key"),
    ("score: dropout of the pair", SCORE, "kept | keeps(second) << 1", "kept | kept << 1"),
    ("score: terms of the wrong tile", SCORE, "apply(s[t][0][i], t, n, i)", "apply(s[t][0][i], t, 0, i)"),
    ("score: tiles do not turn", SCORE, "s[t][m][i] = s[t][m + 1][i]", "s[t][m][i] = s[t][m][i]"),
    ("mask: edge tile taken for whole", MASK, "key + keys <= all_hi", "key <= all_hi"),
    ("mask: last tile missed", MASK, "key < seen_hi &&", "key + keys <= seen_hi &&"),
    ("mask: walk past the list", MASK, "at_[g] += here", "at_[g] += 1"),
    ("mask: half of a tile's columns", MASK, " | words[threadIdx.x % kWarp + kWarp]", ""),
    (
        "mask: extents of half a warp",
        MASK,
        "lanes = 16; lanes > 0; lanes /= 2) {\n    x = join",
        "lanes = 8; lanes > 0; lanes /= 2) {\n    x = join",
    ),
    ("mask: one head of a group", MASK, "if (++h_ >= h_end_)", "if (++h_)"),
    ("mask: band of rows", MASK, "max(key_ - a_.band_hi, 0)", "max(key_ + kGranule, 0)"),
    (
        "queries: no barrier before a tile is read",
        BACKWARD,
        TOP,
        "    cp_async_wait<0>();\n    const ",
        QUERIES,
    ),
    ("queries: no wait for a tile", BACKWARD, TOP, "    __syncthreads();\n    const ", QUERIES),
    (
        "queries: the only stage filled too early",
        BACKWARD,
        "else __syncthreads();  // before",
        "// before",
        QUERIES,
    ),
    (
        "queries: next tile into the stage in use",
        BACKWARD,
        "load_keys(ahead, stage ^ 1)",
        "load_keys(ahead, stage)",
        QUERIES,
    ),
    ("queries: dQ not scaled", BACKWARD, "a.D, dq, a.scale", "a.D, dq, 1.0f", QUERIES),
    ("keys: no barrier before a tile is read", BACKWARD, TOP, "    cp_async_wait<0>();\n    const ", KEYS),
    ("keys: no wait for a tile", BACKWARD, TOP, "    __syncthreads();\n    const ", KEYS),
    (
        "keys: the only stage filled too early",
        BACKWARD,
        "else __syncthreads();  // before",
        "// before",
        KEYS,
    ),
    (
        "keys: statistics of the wrong stage",
        BACKWARD,
        "smem.delta[stage][row] =",
        "smem.delta[0][row] =",
        KEYS,
    ),
    ("keys: words of the wrong stage", BACKWARD, "smem.words[stage][row] =", "smem.words[0][row] =", KEYS),
    (
        "keys: no commit",
        BACKWARD,
        "first, rows);\n    cp_async_commit();\n    if (threadIdx",
        "first, rows);\n    if (threadIdx",
        KEYS,
    ),
    (
        "keys: columns of the first group",
        BACKWARD,
        "multiply_rounded<kHead>(dk, dp, &smem.q[stage][first * kHead], column)",
        "multiply_rounded<kHead>(dk, dp, &smem.q[stage][first * kHead], 0)",
        KEYS,
    ),
    ("keys: output tail not guarded", BACKWARD, "    if (row + half * 8 >= limit) continue;\n", ""),
    (
        "gradient: hidden scores count",
        BACKWARD,
        "  if (!seen) return {0.0f, 0.0f, 0.0f};\n",
        "  (void)seen;\n",
    ),
    ("gradient: softcap's slope forgotten", BACKWARD, "ds * cap_slope", "ds"),
    (
        "gradient: dropped dP counts",
        BACKWARD,
        "dp = kept ? dp * a.dropout_scale : 0.0f",
        "dp = dp * a.dropout_scale",
    ),
    (
        "rows: no barrier before the extents",
        ROWS,
        "  __syncthreads();\n  if (thread == 0) {\n    const Extent",
        "  if (thread == 0) {\n    const Extent",
    ),
    ("rows: half of the extents", ROWS, "join(smem.extent[0], smem.extent[1])", "smem.extent[0]"),
    ("rows: sum over half a warp", ROWS, "lanes = 16;", "lanes = 8;"),
    (
        "sinks: no barrier before the sums",
        ROWS,
        "  __syncthreads();\n  if (thread == 0) a.dsinks",
        "  if (thread == 0) a.dsinks",
    ),
    (
        "terms: no barrier before the tiles are filled",
        TERMS,
        "        __syncthreads();  // the tiles before",
        "        // the tiles before",
    ),
    ("terms: no wait", TERMS, "        cp_async_wait<0>();\n", ""),
    (
        "terms: no barrier before the tiles are read",
        TERMS,
        "        cp_async_wait<0>();\n        __syncthreads();\n",
        "        cp_async_wait<0>();\n",
    ),
    ("terms: no barrier before the sums", TERMS, "    }\n    __syncthreads();\n#pragma", "    }\n#pragma"),
    ("terms: a lane alone", TERMS, "lanes = 4; lanes < kWarp", "lanes = 8; lanes < kWarp"),
]

sys.path.insert(0, str(TWIN.parent))


def plant(bug, tree: Path) -> None:
    name, header, old, new, *behind = bug
    path = tree / "csrc" / "cuda" / f"{header}.{'h' if header == 'layout' else 'cuh'}"
    text = path.read_text()
    start = text.index(behind[0]) if behind else 0
    if old not in text[start:]:
        raise SystemExit(f"{name}: the text is not in {path.name} any more")
    # A text that occurs twice stands for both, but behind a function only for the first.
    path.write_text(text[:start] + text[start:].replace(old, new, 1 if behind else -1))


def attempt(tree: Path, kind: str, schedules) -> str | None:
    """What is noticed, or nothing."""
    from twin import build

    program = tree / kind
    flags = [f.replace(str(ROOT), str(tree)) for f in build.FLAGS if not f.startswith("-W")]
    optimise = ["-O1"] if kind == "plain" else build.KINDS[kind]
    source = tree / "tests" / "twin" / "attention_check.cpp"
    done = subprocess.run(
        ["g++", *flags, *optimise, "-x", "c++", str(source), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    env = dict(os.environ, TSAN_OPTIONS="halt_on_error=1")
    for schedule in schedules:
        try:
            result = subprocess.run(
                [program, str(schedule)], env=env, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            return f"schedule {schedule}: does not end"
        if result.returncode:
            said = [line for line in result.stdout.splitlines() if "FAILED" in line]
            said += [line for line in result.stderr.splitlines() if "SUMMARY" in line]
            what = said[0].split("FAILED ")[-1].split(" /")[0] if said else f"exit {result.returncode}"
            return f"schedule {schedule}: {what[:70]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bugs", nargs="+", default=[""])
    parser.add_argument("--no-tsan", action="store_true")
    parser.add_argument("--write", action="store_true", help="write planted_bugs.md")
    args = parser.parse_args()
    rows, missed = [], []
    for bug in BUGS:
        if not bug[0].startswith(tuple(args.bugs)):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch)
            shutil.copytree(ROOT / "csrc" / "cuda", tree / "csrc" / "cuda")
            shutil.copytree(TWIN, tree / "tests" / "twin", ignore=shutil.ignore_patterns("__pycache__"))
            plant(bug, tree)
            found = attempt(tree, "plain", SCHEDULES)
            if found is None and not args.no_tsan and not bug[0].startswith("control"):
                found = attempt(tree, "tsan", [0])
                found = found and f"ThreadSanitizer, {found}"
        if found is None and not bug[0].startswith("control"):
            missed.append(bug[0])
        rows.append((bug[0], found or "not noticed"))
        print(f"{bug[0]}: {rows[-1][1]}", flush=True)
    planted = sum(not name.startswith("control") for name, _ in rows)
    summary = f"{planted} bugs planted, {planted - len(missed)} noticed."
    print(summary, *missed, sep="\n  ")
    if args.write:
        table = "\n".join(f"| {name} | {found} |" for name, found in rows)
        head = f"# Planted bugs\n\nThe last report of `plant_bugs.py`. {summary}\n\n| bug | noticed by |\n|---|---|\n"
        (TWIN / "planted_bugs.md").write_text(head + table + "\n")
    control_fails = any(name.startswith("control") and found != "not noticed" for name, found in rows)
    return int(control_fails)


if __name__ == "__main__":
    sys.exit(main())
