"""Bugs for plant_triton_bugs.py: changes of the text of kernels/, each with the tests that should notice it."""

from __future__ import annotations

from dataclasses import dataclass, field

FORWARD, DECODE, LAUNCH = "test_triton_attention", "test_triton_decode", "test_triton_launch"


@dataclass(frozen=True)
class Bug:
    """old stands once in kernels/<module>.py; only: pytest's -k for the run that comes first; tests: whole files."""

    name: str
    module: str
    old: str
    new: str
    only: str = ""
    tests: list[str] = field(default_factory=lambda: [FORWARD, DECODE, LAUNCH])


EXACTLY = "sees_exactly and not random"

BUGS = [
    Bug("control: no bug", "mask", "GRANULE = ", "GRANULE = ", "merge or minus_infinity"),
    # What a row sees.
    Bug("ranges: upper edge", "mask", "o_i + band_hi + 1, end", "o_i + band_hi, end", f"{EXACTLY} and lower"),
    Bug(
        "ranges: an edge block on the left taken for whole",
        "mask",
        "tl.maximum(tl.cdiv(all_lo, N), first)",
        "tl.maximum(all_lo // N, first)",
        f"{EXACTLY} and (left or window)",
    ),
    Bug(
        "ranges: an edge block on the right taken for whole",
        "mask",
        "tl.minimum(all_hi // N, last)",
        "tl.minimum(tl.cdiv(all_hi, N), last)",
        f"{EXACTLY} and lower",
    ),
    Bug(
        "ranges: the blocks right of the whole ones",
        "mask",
        "full_end + t - (full - first)",
        "full_end + t",
        f"{EXACTLY} and window",
    ),
    Bug("bits: the words' halves", "mask", "o_c[None, :] < 32", "o_c[None, :] < 33", f"{EXACTLY} and dense"),
    Bug("bits: a granule skipped", "mask", ") < granule", ") <= granule", f"{EXACTLY} and dense"),
    Bug(
        "bits: the last granule within ranges",
        "attention",
        "tl.cdiv(seen_hi, GRANULE)",
        "seen_hi // GRANULE",
        f"{EXACTLY} and dense",
    ),
    Bug(
        "bits: a full granule over the end of a range",
        "attention",
        "(tile >= 0) | (first < all_lo) | (first + N > all_hi)",
        "(tile >= 0) | (first < all_lo)",
        "every_row_sees or dense",
    ),
    Bug("bits: the rows' granule", "attention", "start // GRANULE", "start // M", "tiles_of_each"),
    # Scores.
    Bug(
        "score: alibi ahead of the row",
        "score",
        "tl.abs(q_pos[:, None] - k_pos[None, :])",
        "(q_pos[:, None] - k_pos[None, :])",
        "alibi",
    ),
    Bug("score: tanh's series", "score", "a < 0.25", "a < 2.5", "score_terms and softcap"),
    Bug(
        "score: NaN beside a bias of -inf",
        "score",
        'b_s = tl.where(b_bias == float("-inf"), float("-inf"), b_s)',
        "pass",
        "minus_infinity",
    ),
    Bug(
        "score: the lowest bias overflows",
        "online_softmax",
        "tl.exp2((b_s - pivot[:, None]) * LOG2E)",
        "tl.exp2(b_s * LOG2E - pivot[:, None] * LOG2E)",
        "lowest",
    ),
    Bug(
        "dropout: lanes of the keys",
        "philox",
        "tl.interleave(w0, w2), tl.interleave(w1, w3)",
        "tl.interleave(w0, w1), tl.interleave(w2, w3)",
        "committed_dropout",
    ),
    Bug("dropout: lanes by positions", "philox", "lane == 2, w2, w3", "lane == 2, w3, w2", "by_positions"),
    Bug("dropout: the seed's upper half", "philox", "seed >> 32", "seed >> 31", "committed_dropout"),
    # The softmax and what it sums.
    Bug(
        "softmax: the second part not corrected",
        "attention",
        "acc1 = acc1 * alpha[:, None]",
        "acc1 = acc1 * 1.0",
        "shapes",
    ),
    Bug(
        "softmax: no pivot for unseen rows",
        "online_softmax",
        'pivot = tl.where(new == float("-inf"), 0.0, new)',
        "pivot = new",
        "nothing or almost",
    ),
    Bug(
        "scores: columns of the second part",
        "attention",
        "load_part(p_k, o_k, k_row, m_k, D0, D1, D, BOUNDED)",
        "load_part(p_k, o_k, k_row, m_k, 0, D1, D, BOUNDED)",
        "shapes",
    ),
    Bug(
        "rows: columns past the head",
        "tiles",
        "mask=m[:, None] & (o_d < D)[None, :]",
        "mask=m[:, None]",
        "shapes",
    ),
    Bug("rows: unseen ones keep their sums", "tiles", "seen = (l != 0.0)", "seen = (l == l)", "nothing"),
    # Hidden NaN.
    Bug("hidden: never looked for", "attention", "    if wrong:", "    if M == 7:", "hidden"),
    Bug(
        "hidden: not in the second part",
        "attention",
        "wrong = wrong | has_nan(acc1)",
        "wrong = wrong | False",
        "hidden",
    ),
    Bug(
        "hidden: values of every key",
        "attention",
        'm_keys = tl.max((b_s != float("-inf")).to(tl.int32), 0) > 0',
        "m_keys = m_n",
        "hidden",
    ),
    Bug(
        "hidden: splits written over",
        "attention",
        "split, part + s, tensors",
        "split, part, tensors",
        "hidden",
    ),
    # Programs and their places.
    Bug(
        "places: heads of a packed row",
        "attention",
        "o_h = i_h * group + o_r % group",
        "o_h = i_h * group",
        "packed",
    ),
    Bug("places: K/V head", "attention", "i_kv = i_h // group", "i_kv = i_h % group", "shapes"),
    Bug(
        "places: the last block of rows",
        "attention",
        "n_blocks - 1 - rest // size",
        "n_blocks - 1 - rest // section",
        "sections",
    ),
    Bug(
        "places: the last section",
        "attention",
        "size = tl.minimum(section, planes - start)",
        "size = section",
        "sections",
    ),
    Bug(
        "places: a length is compiled in", "attention", '"group", "Sq", "Sk",', '"group", "Sk",', "new_length"
    ),
    Bug("splits: keys twice", "attention", "end = tl.minimum(first + SPLIT, Sk)", "end = Sk", "routes"),
    Bug(
        "splits: the tail missed",
        "attention_plan",
        "splits = -(-Sk // launch.DECODE_SPLIT)",
        "splits = Sk // launch.DECODE_SPLIT",
        "routes",
    ),
    Bug("splits: units of the merge", "decode", "(unit * LOG2E)", "1.0", "routes or lowest"),
    Bug(
        "splits: past the first 16",
        "decode",
        "    acc = tl.zeros([1, WIDTH], tl.float32)\n    for first in tl.range(0, splits, CHUNK):",
        "    acc = tl.zeros([1, WIDTH], tl.float32)\n    for first in tl.range(0, CHUNK, CHUNK):",
        "merge",
    ),
    Bug("splits: blocks of rows", "decode", "plane * n_blocks + r // M", "plane * n_blocks", "two_blocks"),
    Bug("splits: rows of a group", "decode", "r = i_i * group + i_h % group", "r = i_i * group", "routes"),
    Bug("tuning: takes the slowest", "tune", "min(tiles", "max(tiles", "tuning"),
]
