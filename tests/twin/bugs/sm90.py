"""Bugs to plant in Hopper's attention forward.

Not among them: the baton passed before the products are issued. The products then start in another order, which costs
speed and no result.
"""

from . import Bug

PROGRAM, FLAGS, ARGUMENTS = "attention_sm90.cpp", ("-DFASTATTN_ONLY_D=64",), ()
ARGUMENTS_TSAN = ("3",)  # of five cases

KERNEL, ROWS, WALK = "attention_sm90.cuh", "attention_sm90_rows.cuh", "attention_sm90_walk.cuh"
LAUNCH, SCHEDULE = "attention_sm90_launch.h", "attention_sm90_schedule.cuh"
WAIT_KEYS = "      mbarrier_wait(&smem.k_full[stage], parity_of(keys));\n"
WAIT_VALUES = (
    "        mbarrier_wait(&smem.v_full[stage_of(values)], parity_of(values));\n        wgmma_fence();"
)
STEADY = """        scores_to_weights();
        wgmma_wait<0>(o);
        release(&smem.v_empty[stage_of(values)]);
"""

BUGS = [
    Bug("no wait for keys", KERNEL, WAIT_KEYS, ""),
    Bug("parity of keys", KERNEL, WAIT_KEYS, WAIT_KEYS.replace("keys))", "keys) ^ 1)")),
    Bug("no wait for values beside scores", KERNEL, WAIT_VALUES, "        wgmma_fence();"),
    Bug(
        "no wait for the last values",
        KERNEL,
        "      mbarrier_wait(&smem.v_full[stage_of(values)], parity_of(values));\n      wgmma_fence();",
        "      wgmma_fence();",
    ),
    Bug("no wait for Q", KERNEL, "    mbarrier_wait(&smem.q_full, turn);\n", ""),
    Bug(
        "keys loaded over those in use",
        KERNEL,
        "        mbarrier_wait(&smem.k_empty[stage], int(keys() / kStages & 1) ^ 1);\n",
        "",
    ),
    Bug(
        "values loaded over those in use",
        KERNEL,
        "        mbarrier_wait(&smem.v_empty[stage], int(values / kStages & 1) ^ 1);\n",
        "",
    ),
    Bug(
        "Q loaded over that in use",
        KERNEL,
        "    mbarrier_wait(&smem.q_empty, int(round() & 1) ^ 1);\n",
        "",
    ),
    Bug("count of values", KERNEL, "keys() - round() - 2", "keys() - round() - 1"),
    Bug("bytes of the bit tiles not expected", KERNEL, "kBlockBytes + tiles * kTileBytes", "kBlockBytes"),
    Bug(
        "too many bytes expected",
        KERNEL,
        "Smem::kM * kD * int(sizeof(T)));",
        "Smem::kM * kD * int(sizeof(T)) + 16);",
    ),
    Bug(
        "bit tiles on the values' barrier",
        KERNEL,
        "kTileBytes, &smem.k_full[stage]);",
        "kTileBytes, &smem.v_full[stage]);",
    ),
    Bug(
        "bit tile of the next row",
        KERNEL,
        "int64_t(plan.tile[i]) * kGranule,",
        "int64_t(plan.tile[i]) * kGranule + 2,",
    ),
    Bug("keys of the other head", KERNEL, "n_block * Smem::kN, kv_head,", "n_block * Smem::kN, kv_head + 1,"),
    Bug(
        "the plan after the arrival",
        KERNEL,
        "        if (lane == 0) smem.first_key[stage] = n_block * Smem::kN;\n        __syncwarp();",
        "        if (lane == 1) smem.first_key[stage] = n_block * Smem::kN;\n        //",
    ),
    Bug(
        "one slot for the tile",
        KERNEL,
        "smem.tile[round() % 2] =",
        "smem.tile[0] = smem.tile[1] =",
    ),
    Bug("wait<1> where nothing may be left", KERNEL, STEADY, STEADY.replace("<0>", "<1>")),
    Bug("scores read before they are there", KERNEL, "wgmma_wait<1>(s)", "wgmma_wait<2>(s)"),
    Bug(
        "values released before the product ended",
        KERNEL,
        STEADY,
        STEADY.replace("        wgmma_wait<0>(o);\n", "") + "        wgmma_wait<0>(o);\n",
    ),
    Bug(
        "keys released before the product ended",
        KERNEL,
        "        wgmma_wait<1>(s);\n        scores_to_weights();",
        "        release(&smem.k_empty[stage_of(keys)]);\n        wgmma_wait<1>(s);\n"
        "        release(&smem.k_empty[stage_of(keys)]);\n        scores_to_weights();",
    ),
    Bug(
        "weights rounded while they are read",
        KERNEL,
        STEADY,
        STEADY.replace(
            "        wgmma_wait<0>(o);\n", "        round_weights<T>(p, s);\n        wgmma_wait<0>(o);\n"
        ),
    ),
    Bug(
        "O rescaled while it is summed",
        KERNEL,
        STEADY,
        STEADY.replace(
            "        wgmma_wait<0>(o);\n", "        rescale(o, correction);\n        wgmma_wait<0>(o);\n"
        )
        + "        correction[0] = correction[1] = 1.0f;\n",
    ),
    Bug(
        "no fence before the scores",
        KERNEL,
        "        wgmma_fence();\n        issue_scores",
        "        issue_scores",
    ),
    Bug("no commit of the scores", KERNEL, "d > 0);\n  }\n  wgmma_commit();", "d > 0);\n  }\n"),
    Bug("no commit of the values", KERNEL, "true);\n  }\n  wgmma_commit();", "true);\n  }\n"),
    Bug("scores accumulate from the start", KERNEL, "1024), d > 0);", "1024), true);"),
    Bug("stride of a descriptor", KERNEL, "kN * 128, 1024), true);", "kN * 128, 512), true);"),
    Bug("step along d", KERNEL, "column_bytes = d % 64 * 2;", "column_bytes = d % 64;"),
    Bug("step along keys", KERNEL, "v_address + n * 128", "v_address + n * 64"),
    Bug("first row of Q", KERNEL, "smem.q + warpgroup * kGranule * 64", "smem.q"),
    Bug("another swizzle", LAUNCH, "Swizzle::B128});", "Swizzle::None});"),
    Bug("no first baton", KERNEL, "  if (warpgroup == Tile::kConsumers - 1) pass_baton();", "  //"),
    Bug(
        "baton to the wrong consumer",
        KERNEL,
        "(warpgroup + 1) % Tile::kConsumers",
        "(warpgroup + 2) % Tile::kConsumers",
    ),
    Bug(
        "no turn in a block that is let pass",
        KERNEL,
        "        take_baton();\n        pass_baton();\n",
        "",
    ),
    Bug(
        "values not let pass",
        KERNEL,
        "be arrived at twice\n        release(&smem.v_empty[stage_of(values)]);\n",
        "be arrived at twice\n",
    ),
    Bug("Q never released", KERNEL, "      release(&smem.q_empty);  //", "      //"),
    Bug(
        "Q released at once",
        KERNEL,
        "    __syncwarp();\n    row_max[0] =",
        "    release(&smem.q_empty);\n    row_max[0] =",
    ),
    Bug("every lane releases", KERNEL, "if (thread_index() % kWarp == 0) mbarrier_arrive", "mbarrier_arrive"),
    Bug(
        "too few arrivals wanted",
        KERNEL,
        "kConsumerWarps = Tile::kConsumers * 4",
        "kConsumerWarps = Tile::kConsumers * 4 - 1",
    ),
    Bug("no barrier after mbarrier_init", KERNEL, "  __syncthreads();\n\n  if (shfl", "  if (shfl"),
    Bug("ranges of the rows above", KERNEL, "ranges(uint32_t(row))", "ranges(uint32_t(row) - 1)"),
    Bug("O not rescaled", KERNEL, "        rescale(o, correction);\n", ""),
    Bug("range one key too long", ROWS, "seen.hi - first", "seen.hi + 1 - first"),
    Bug("range not applied", ROWS, "plan.seen == kSeenByRanges", "plan.seen == kSeenByBits"),
    Bug("bits of the other half", ROWS, "words[g][first_row + 8 * half]", "words[g][first_row]"),
    Bug("bits not shifted", ROWS, "      word >>= first_column;", "      //"),
    Bug(
        "sum of one lane",
        ROWS,
        "const float sum = quad_sum(row_sum[half]);",
        "const float sum = row_sum[half];",
    ),
    Bug("rows that see nothing", ROWS, "maximum == -INFINITY ? 0.0f : maximum * factor", "maximum * factor"),
    Bug(
        "tail stored",
        ROWS,
        "        if (inside) *reinterpret_cast<uint4*>",
        "        *reinterpret_cast<uint4*>",
    ),
    Bug(
        "order of the quad",
        ROWS,
        "shfl_xor(odd ? word[j] : word[j + 1], 1)",
        "shfl_xor(odd ? word[j + 1] : word[j], 1)",
    ),
    Bug(
        "extent of the first rows only",
        WALK,
        "for (int part = 0; part < 2; ++part)",
        "for (int part = 0; part < 1; ++part)",
    ),
    Bug(
        "edge taken for whole",
        WALK,
        "else if (key < all_.lo || key + kGranule > all_.hi)",
        "else if (key < all_.lo)",
    ),
    Bug("search one short", WALK, "else end = middle;", "else end = middle - (middle > first_);"),
    Bug(
        "a tile's last section", SCHEDULE, "section == schedule.sections - 1", "section == schedule.sections"
    ),
    Bug(
        "shortest first",
        SCHEDULE,
        "schedule.last_first ? schedule.m_blocks - 1 - m : m",
        "schedule.last_first ? m : schedule.m_blocks - 1 - m",
    ),
    Bug(
        "values let pass before they are there",
        KERNEL,
        "        mbarrier_wait(&smem.v_full[stage_of(values)],\n"
        "                      parity_of(values));  // else a phase could be arrived at twice\n",
        "",
    ),
    Bug(
        "baton passed twice",
        KERNEL,
        "        pass_baton();\n        wgmma_wait<1>(s);",
        "        pass_baton();\n        pass_baton();\n        wgmma_wait<1>(s);",
    ),
    Bug("no fence_mbarrier_init", KERNEL, "    fence_mbarrier_init();\n", ""),
    Bug("the last baton left lying", KERNEL, "  if (warpgroup == 0) take_baton();", "  //"),
    Bug(
        "granules of a row that is summed again",
        ROWS,
        "args.block_list[2 * at] < granule) ++at",
        "args.block_list[2 * at] <= granule) ++at",
    ),
]

# Without a baton, whose barrier orders more than it is there for.
BUGS_256 = [
    Bug(
        "D = 256: no barrier round the rows' ranges",
        KERNEL,
        "    __syncwarp();\n    row_max[0] =",
        "    row_max[0] =",
    ),
    Bug("D = 256: no wait for values beside scores", KERNEL, WAIT_VALUES, "        wgmma_fence();"),
    Bug("D = 256: first row of Q", KERNEL, "smem.q + warpgroup * kGranule * 64", "smem.q"),
]
BUGS += [bug._replace(flags=("-DFASTATTN_ONLY_D=256",)) for bug in BUGS_256]
