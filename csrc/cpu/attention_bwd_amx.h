// The products of the backward on AMX, for bf16: what GradientTile asks of TiledRows.
//
//   S = Q K^T, dP = dO V^T          A: rows of Q and dO as they lie, B: pairs along the width of K and V
//   dQ += dS K                      A: rows of dS in bf16, B: pairs of keys
//   dK^T += Q^T dS, dV^T += dO^T P  A: Q^T and dO^T, B: pairs of query rows, as the vectors leave them
//
// Transposed, dK and dV take P and dS as they are written; the accumulators are turned once, when a granule
// of keys is stored. K and V are packed once a granule, Q^T and dO^T once a query block of a head, and kept
// while the granules of that head go by.
//
// A tile of 64 x 64 is up to four blocks of 32 x 32; those that no row sees are left out. First the matrix
// unit works (dQ of the tile before, dK and dV of the last few tiles, then S and dP), then the vectors (P and
// dS). The sums dK^T and dV^T lie in the second-level cache and are fetched once for kChunkTiles tiles.
//
// The two do not overlap, unlike in the forward. Counted for D = 64 on the processor it was measured on (one
// core of family 6, model 167): 40 steps of four products with their operands in L1 at 26 ns, 56 stores and
// 24 loads of results at 5.3 and 2.7 ns, and 790 ns of vectors, 2.2 us a tile. Measured at 1024 keys: 3.7 us,
// 0.7 of some 2.5 TF/s. The difference is operands and sums out of the second level, the change from one unit
// to the other and 0.25 us to pack a granule. TMUL is kept awake between the blocks of vectors, 2 to 6 % of a
// call. Tried without gain: tile products between the vectors, 3.9 us, since beside TMUL vectors of 512 bits
// run at one instruction a cycle in place of two; the last sums of a product stored beside the next product
// (0 to 4 %); S and dP of 32 rows at a time, for 16 KB less of L1.
#pragma once

#include "attention_bwd_args.h"
#include "packed_heads.h"
#include "tile_queue.h"

namespace fastattn {
namespace {

constexpr int64_t kLaneRowBytes = kGranule * 4;                // a row of 64 words
constexpr int64_t kHalfPairBytes = kTileSide * kLaneRowBytes;  // 32 rows of them as pairs
constexpr int64_t kBlockBytes = kBlockSide * kLaneRowBytes;    // 32 rows

// The operands of one step, 32 of the inner dimension.
struct StepOperands {
  const char *a, *b;
};

// Blocks of 32 x 32 results, C (+)= A B, one after the other; strides in bytes. A tile is 16 rows of 64
// bytes.
struct BlockProduct {
  const char *a, *b;
  const StepOperands* listed;  // null: a and b, and every a_step and 16 rows of b from there
  char* c;
  int64_t a_row, a_tile, a_step, a_block;  // to the next row, lower tile, step and block
  int64_t b_row, b_block;
  int64_t c_row, c_block;
  int steps, blocks;
  bool accumulate;
};

// 16 rows of a block on one pair of sums, the other pair stored meanwhile: what writes a register waits until
// it has been stored, and the store until its last product is done.
template <int PAIR>
FASTATTN_INLINE void run_rows(Tiles& tiles, const BlockProduct& p, int64_t a_at, int64_t b_at, char* c,
                              char* late) {
  constexpr int kLeft = 2 * PAIR, kRight = kLeft + 1, kLate = 2 - kLeft;
  const auto step = [&]<int A>(int n) __attribute__((always_inline)) {
    tiles.load<A>((p.listed ? p.listed[n].a : p.a + n * p.a_step) + a_at, p.a_row);
    const char* b = (p.listed ? p.listed[n].b : p.b + n * kTileSide * p.b_row) + b_at;
    tiles.load<6>(b, p.b_row);
    tiles.multiply<kLeft, A, 6>();
    tiles.load<7>(b + kTileRowBytes, p.b_row);
    tiles.multiply<kRight, A, 7>();
  };
  if (p.accumulate) tiles.load<kLeft>(c, p.c_row), tiles.load<kRight>(c + kTileRowBytes, p.c_row);
  else tiles.zero<kLeft>(), tiles.zero<kRight>();
  step.template operator()<4>(0);
  if (late) tiles.store<kLate>(late, p.c_row);
  if (p.steps > 1) step.template operator()<5>(1);
  if (late) tiles.store<kLate + 1>(late + kTileRowBytes, p.c_row);
  for (int n = 2; n < p.steps; n += 2) {
    step.template operator()<4>(n);
    if (n + 1 < p.steps) step.template operator()<5>(n + 1);
  }
}

// The product on the eight registers: two pairs of sums, two tiles of A, two of B.
__attribute__((noinline)) inline void run_product(Tiles& tiles, const BlockProduct& p) {
  char *c = p.c, *late = nullptr;
  int64_t a_block = 0, b_block = 0;
  for (int block = 0; block < p.blocks; ++block) {
    char* lower = c + p.c_row * kTileSide;
    run_rows<0>(tiles, p, a_block, b_block, c, late);
    run_rows<1>(tiles, p, a_block + p.a_tile, b_block, lower, c);
    late = lower;
    c += p.c_block, a_block += p.a_block, b_block += p.b_block;
  }
  if (late) tiles.store<2>(late, p.c_row), tiles.store<3>(late + kTileRowBytes, p.c_row);
}

// Where the products of a tile go; null: not asked for. dq has the block's rows, dk and dv hold [width][64].
struct GradientTargets {
  float *dq, *dk, *dv;
};

class GradientMatrices {
 public:
  // `places`: query blocks that will come again and again.
  static int64_t bytes(const AttentionBwdArgs& a, int64_t places) {
    const Layout l(a, places);
    return kVectorBytes + kChunkBytes + align64(l.kept) + l.fixed() + (l.kept + kSpare) * l.slot();
  }

  GradientMatrices(const AttentionBwdArgs& a, int64_t places, float* scratch)
      : a_(a), layout_(a, places), tiles_(whole_tiles()) {
    char* memory = (char*)scratch;
    const auto take = [&](int64_t bytes) {
      char* at = memory;
      memory += bytes;
      return at;
    };
    scores = (float*)take(kGranule * kLaneRowBytes), ds = (float*)take(kGranule * kLaneRowBytes);
    cap = (float*)take(kGranule * kLaneRowBytes);
    chunk_.p = take(kChunkTiles * kPairBytes), chunk_.ds = take(kChunkTiles * kPairBytes);
    ds_narrow = (float*)take(kGranule / 2 * kLaneRowBytes);
    packed_ = (uint8_t*)take(align64(layout_.kept));
    staging_ = (BFloat16*)take(layout_.widest());
    ragged_q_ = take(layout_.q), ragged_dout_ = take(layout_.dout);
    k_t_ = take(layout_.q), v_t_ = take(layout_.dout), k_rows_ = take(layout_.q);
    slots_ = memory;
    forget_queries();
  }

  // Of a tile, [64 rows][64 keys]: what the vectors read and write.
  float *scores, *ds, *cap, *ds_narrow;
  int32_t *p_pairs = nullptr, *ds_pairs = nullptr;

  // Another head comes.
  void forget_queries() { memset(packed_, 0, size_t(layout_.kept)); }

  void pack_keys(const BFloat16* k, const BFloat16* v, int keys) {
    pack_pairs_of_width(k, a_.k.row, keys, a_.D, layout_.D, k_t_);
    pack_pairs_of_width(v, a_.v.row, keys, a_.Dv, layout_.Dv, v_t_);
  }

  // Keys that lie 16 apart, in pairs. Rows of `bad` are 0.
  void pack_key_rows(const BFloat16* k, int keys, uint64_t bad) {
    const auto [x, stride] = whole_rows(k, a_.k.row, keys, a_.D, layout_.D, bad);
    int32_t* out = (int32_t*)k_rows_;
    for (int r = 0; r < kGranule / 2; ++r, out += layout_.D) {
      const BFloat16 *low = x + (r + r / kTileSide * kTileSide) * stride, *high = low + kTileSide * stride;
      for (int64_t d = 0; d < layout_.D; d += 2 * kLanes) {
        I32 first, last;
        interleave(low + d, high + d, &first, &last);
        store(out + d, first), store(out + d + kLanes, last);
      }
    }
  }

  // A block of queries; `place` says which of those to come again.
  void load_queries(const BFloat16* q, const BFloat16* dout, int count, const QueryBlock& block,
                    int64_t place, bool q_t, bool dout_t) {
    const bool keep = place < layout_.kept;
    char* slot = slots_ + (keep ? place : layout_.kept + spare_++ % kSpare) * layout_.slot();
    const bool pack = !keep || !packed_[place];
    q_t_ = slot, dout_t_ = q_t_ + layout_.q;
    if (pack && q_t) pack_columns(q, a_.q.row, count, a_.D, layout_.D, block.bad_q, q_t_);
    if (pack && dout_t) pack_columns(dout, a_.dout.row, count, a_.Dv, layout_.Dv, block.bad_dout, dout_t_);
    char* copy = dout_t_ + layout_.dout;
    q_ = rows_of(q, a_.q.row, count, a_.D, layout_.D, layout_.copies_q ? copy : ragged_q_, layout_.copies_q,
                 pack);
    if (layout_.copies_q) copy += layout_.q;
    dout_ = rows_of(dout, a_.dout.row, count, a_.Dv, layout_.Dv, layout_.copies_dout ? copy : ragged_dout_,
                    layout_.copies_dout, pack);
    if (keep) packed_[place] = 1;
  }

  // S and dP of a block: 32 rows from `first` on, lane vectors [from, from + 2).
  void compute_scores(const Segment& s) {
    compute_scores_of(q_, layout_.D, k_t_, s, (char*)scores);
    compute_scores_of(dout_, layout_.Dv, v_t_, s, (char*)ds);
  }

  // Finishes the tile before and finds places for P and dS of the one to come.
  void begin_tile(const GradientTargets& to) {
    compute_deferred();
    if (chunk_.tiles == kChunkTiles) compute_chunk();
    chunk_.to = to;
    p_pairs = (int32_t*)(chunk_.p + chunk_.tiles * kPairBytes);
    ds_pairs = (int32_t*)(chunk_.ds + chunk_.tiles * kPairBytes);
    ++chunk_.tiles;
  }

  // The products of a block for dK and dV, with those of the whole chunk.
  void defer_keys(const Segment& s) {
    const int64_t half = s.first / kBlockSide, block = s.from / 2;
    const int64_t at = half * kHalfPairBytes + block * 2 * kTileRowBytes;
    const int n = chunk_.steps[block]++;
    chunk_.dv[block][n] = {dout_t_ + half * kTileBytes, (const char*)p_pairs + at};
    chunk_.dk[block][n] = {q_t_ + half * kTileBytes, (const char*)ds_pairs + at};
  }

  // Those of 32 rows for dQ, with the next tile.
  void defer_queries(const Segment& s) {
    float* dq = chunk_.to.dq;
    if (!dq) return;
    const int from = s.from / 2;
    const int64_t row = layout_.D * 4;
    BlockProduct& p = waiting_[waiting_count_++];
    p.a = (const char*)ds_narrow + s.first * kGranule * 2 + from * kTileRowBytes, p.listed = nullptr;
    p.a_row = kGranule * 2, p.a_tile = kTileSide * p.a_row, p.a_step = kTileRowBytes, p.a_block = 0;
    p.b = k_rows_ + from * kTileSide * row, p.b_row = row, p.b_block = 2 * kTileRowBytes;
    p.c = (char*)dq + s.first * row, p.c_row = row, p.c_block = 2 * kTileRowBytes;
    p.steps = s.to / 2 - from, p.blocks = int(layout_.D / kBlockSide), p.accumulate = true;
  }

  void keep_awake() { tiles_.keep_awake(); }

  void finish() {
    compute_deferred();
    compute_chunk();
  }

 private:
  static constexpr int64_t kVectorBytes = (3 * kGranule + kGranule / 2) * kLaneRowBytes;
  // dK and dV of so many tiles at a time: their sums, in the second-level cache, come and go once.
  static constexpr int kChunkTiles = 4;
  static constexpr int64_t kPairBytes = kGranule / 2 * kLaneRowBytes;
  static constexpr int64_t kChunkBytes = 2 * kChunkTiles * kPairBytes;
  static constexpr int kSpare = kChunkTiles + 1;  // blocks under way: those of a chunk, and the next

  struct Chunk {
    char *p, *ds;
    GradientTargets to;
    int tiles, steps[2];  // live halves of the tiles, by block of 32 keys
    StepOperands dk[2][2 * kChunkTiles], dv[2][2 * kChunkTiles];
  };

  struct Layout {
    int64_t D, Dv, q, dout, kept;  // widths padded; q, dout: bytes of 64 rows
    bool copies_q, copies_dout;

    Layout(const AttentionBwdArgs& a, int64_t places) : D(padded_width(a.D)), Dv(padded_width(a.Dv)) {
      q = kGranule * D * 2, dout = kGranule * Dv * 2;
      copies_q = a.q.row != D || a.D != D, copies_dout = a.dout.row != Dv || a.Dv != Dv;
      const int64_t most = kKeptBytes / slot();
      kept = places < most ? places : most;
    }
    int64_t slot() const { return q * (1 + copies_q) + dout * (1 + copies_dout); }
    int64_t widest() const { return q > dout ? q : dout; }
    int64_t fixed() const { return widest() + 3 * q + 2 * dout; }
  };

  struct RowsAt {
    const BFloat16* x;
    int64_t stride;
  };

  // 64 whole rows: those in memory, or padded and without the rows of `bad` in `staging_`.
  RowsAt whole_rows(const BFloat16* x, int64_t stride, int count, int64_t width, int64_t wide, uint64_t bad) {
    if (count == kGranule && width == wide && !bad) return {x, stride};
    pad_rows(x, stride, count, width, wide, staging_);
    for (; bad; bad &= bad - 1) memset(staging_ + __builtin_ctzll(bad) * wide, 0, size_t(wide) * 2);
    return {staging_, wide};
  }

  // B of S and dP: [wide / 2][64 rows], a word holding two neighbours of a row.
  void pack_pairs_of_width(const BFloat16* x, int64_t stride, int count, int64_t width, int64_t wide,
                           char* out) {
    const RowsAt rows = whole_rows(x, stride, count, width, wide, 0);
    pack_transposed(kGranule, wide / 2, (float*)out,
                    [&](int row, int64_t d) { return load((const float*)(rows.x + row * rows.stride) + d); });
  }

  // A of dK and dV: tiles of 16 columns x 32 rows, two of them to 16 columns.
  void pack_columns(const BFloat16* x, int64_t stride, int count, int64_t width, int64_t wide, uint64_t bad,
                    char* out) {
    const RowsAt rows = whole_rows(x, stride, count, width, wide, bad);
    for (int64_t d = 0; d < wide; d += kTileSide) {
      for (int r = 0; r < kGranule; r += kBlockSide, out += kTileBytes) {
        const BFloat16* at = rows.x + r * rows.stride + d;
        F32 pairs[kTileSide];
        for (int i = 0; i < kTileSide; ++i, at += 2 * rows.stride)
          pairs[i] = float_of(interleave(at, at + rows.stride));
        transpose(pairs);
        for (int i = 0; i < kTileSide; ++i) store((float*)(out + i * kTileRowBytes), pairs[i]);
      }
    }
  }

  // A of S and dP. A ragged block takes a copy of its own, since no row past the last may be read.
  static RowsAt rows_of(const BFloat16* x, int64_t stride, int count, int64_t width, int64_t wide, char* copy,
                        bool copies, bool pack) {
    if (!copies && count == kGranule) return {x, stride};
    if (!copies || pack) pad_rows(x, stride, count, width, wide, (BFloat16*)copy);
    return {(const BFloat16*)copy, wide};
  }

  void compute_scores_of(const RowsAt& rows, int64_t wide, const char* b, const Segment& s, char* c) {
    BlockProduct p;
    p.a = (const char*)(rows.x + s.first * rows.stride), p.listed = nullptr;
    p.a_row = rows.stride * 2, p.a_tile = kTileSide * p.a_row, p.a_step = kTileRowBytes, p.a_block = 0;
    p.b = b + s.from * kTileRowBytes, p.b_row = kLaneRowBytes, p.b_block = 0;
    p.c = c + s.first * kLaneRowBytes + s.from * kTileRowBytes, p.c_row = kLaneRowBytes, p.c_block = 0;
    p.steps = int(wide / kBlockSide), p.blocks = 1, p.accumulate = false;
    run_product(tiles_, p);
  }

  void compute_deferred() {
    for (int i = 0; i < waiting_count_; ++i) run_product(tiles_, waiting_[i]);
    waiting_count_ = 0;
  }

  void compute_chunk() {
    for (int block = 0; block < 2; ++block) {
      if (!chunk_.steps[block]) continue;
      if (chunk_.to.dv) compute_keys(chunk_.dv[block], block, layout_.Dv, chunk_.to.dv);
      if (chunk_.to.dk) compute_keys(chunk_.dk[block], block, layout_.D, chunk_.to.dk);
    }
    chunk_.tiles = chunk_.steps[0] = chunk_.steps[1] = 0;
  }

  void compute_keys(const StepOperands* listed, int block, int64_t wide, float* acc) {
    BlockProduct p;
    p.a = p.b = nullptr, p.listed = listed;
    p.a_row = kTileRowBytes, p.a_tile = 2 * kTileBytes, p.a_step = 0, p.a_block = 4 * kTileBytes;
    p.b_row = kLaneRowBytes, p.b_block = 0;
    p.c = (char*)acc + block * 2 * kTileRowBytes, p.c_row = kLaneRowBytes, p.c_block = kBlockBytes;
    p.steps = chunk_.steps[block], p.blocks = int(wide / kBlockSide), p.accumulate = true;
    run_product(tiles_, p);
  }

  const AttentionBwdArgs& a_;
  const Layout layout_;
  uint8_t* packed_;
  BFloat16* staging_;
  char *ragged_q_, *ragged_dout_, *k_t_, *v_t_, *k_rows_, *slots_, *q_t_ = nullptr, *dout_t_ = nullptr;
  RowsAt q_{}, dout_{};
  int spare_ = 0, waiting_count_ = 0;
  BlockProduct waiting_[2];  // of dQ, by halves
  Chunk chunk_{};
  Tiles tiles_;
};

}  // namespace
}  // namespace fastattn
