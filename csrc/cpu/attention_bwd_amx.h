// The products of the backward on AMX: what GradientTile asks of TiledRows.
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
// dS). The sums dK^T and dV^T lie in the second-level cache and are fetched once for kChunkTiles tiles. They
// are made 32 x 32 at a time, 4 % of a call, since their operands come from there too.
//
// fp16 is split into two bf16, x = high + low exactly, and so are P and dS as the vectors write them, to
// 2^-17. A step loads each part once and takes three products, or four of S and dP. Its operands are twice as
// large, so that a tile at a time fills the first-level cache: dK and dV wait for none, S is done before dP,
// and dK and dV take 32 columns of Q^T or dO^T to both blocks of keys. An infinity times a part that is 0 is
// NaN: scores that are not finite are made again in fp32 where they are seen, and P and dS that have no parts
// are 0 in the products and added one by one, as rows of Q, K and dO are.
//
// The two do not overlap, unlike in the forward. Counted for D = 64 on the processor it was measured on (one
// core of family 6, model 167): 40 steps of four products with their operands in L1 at 26 ns, 56 stores and
// 24 loads of results at 5.3 and 2.7 ns, and 790 ns of vectors, 2.2 us a tile. Measured at 1024 keys: 3.7 us,
// 0.7 of some 2.5 TF/s. The difference is operands and sums out of the second level, the change from one unit
// to the other and 0.25 us to pack a granule. TMUL is kept awake between the blocks of vectors, 2 to 6 % of a
// call. Tried without gain: tile products between the vectors, 3.9 us, since beside TMUL vectors of 512 bits
// run at one instruction a cycle in place of two; the last sums of a product stored beside the next product
// (0 to 4 %); S and dP of 32 rows at a time, for 16 KB less of L1; squares for the other three products,
// chunks of 2 or 8 tiles, and asking ahead for the lines of sums or operands between products.
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

// Of operands in parts, the products of parts that count: high * high, low * high, high * low. The fourth is
// 2^-18 of the result. Of scores in the thousands it decides; and dP must be as exact as the delta that is
// taken from it, or a row that sees one key gets a gradient.
template <int PARTS>
constexpr int kLegs = PARTS == 1 ? 1 : 3;
template <int PARTS>
constexpr int kScoreLegs = PARTS == 1 ? 1 : 4;

// Blocks of 32 x 32 results, C (+)= A B, one after the other; strides in bytes. A tile is 16 rows of 64
// bytes.
struct BlockProduct {
  const char *a, *b;
  const StepOperands* listed;  // null: a and b, and every a_step and 16 rows of b from there
  char* c;
  int64_t a_row, a_tile, a_step, a_block;  // to the next row, lower tile, step and block
  int64_t a_first = 0;                     // to the first block
  int64_t b_row, b_block;
  int64_t c_row, c_block;
  int64_t a_part, b_part;  // from part to part of an operand, high to low
  int steps, blocks;
  bool accumulate;
};

// One step of a product on a pair of sums; A is 4 or 5, and where there are parts the two take turns. What is
// loaded meets all parts that it is multiplied by.
template <int PAIR, int LEGS, int A>
struct ProductStep {
  static constexpr int kLeft = 2 * PAIR, kRight = kLeft + 1, kOther = 9 - A;
  Tiles& tiles;
  const BlockProduct& p;
  const char *a, *b;

  template <int REGISTER>
  FASTATTN_INLINE void load_a(int part) const {
    tiles.load<REGISTER>(a + part * p.a_part, p.a_row);
  }
  FASTATTN_INLINE void load_left(int part) const { tiles.load<6>(b + part * p.b_part, p.b_row); }
  FASTATTN_INLINE void load_right(int part) const {
    tiles.load<7>(b + part * p.b_part + kTileRowBytes, p.b_row);
  }

  FASTATTN_INLINE void first() const {
    load_a<A>(0);
    load_left(0), tiles.multiply<kLeft, A, 6>();
    load_right(0), tiles.multiply<kRight, A, 7>();
  }
  // The next part of A with the part of B that is there.
  FASTATTN_INLINE void next(int part) const {
    load_a<kOther>(part);
    tiles.multiply<kLeft, kOther, 6>(), tiles.multiply<kRight, kOther, 7>();
  }
  // The next part of B with the parts of A that are there.
  FASTATTN_INLINE void turn(int part) const {
    load_left(part), tiles.multiply<kLeft, A, 6>();
    if constexpr (LEGS == 4) tiles.multiply<kLeft, kOther, 6>();
    load_right(part), tiles.multiply<kRight, A, 7>();
    if constexpr (LEGS == 4) tiles.multiply<kRight, kOther, 7>();
  }

  FASTATTN_INLINE void run() const {
    first();
    if constexpr (LEGS > 1) next(1), turn(1);
  }
};

// 16 rows of a block on one pair of sums, the other pair stored meanwhile: what writes a register waits until
// it has been stored, and the store until its last product is done.
template <int PAIR, int LEGS>
FASTATTN_INLINE void run_rows(Tiles& tiles, const BlockProduct& p, int64_t a_at, int64_t b_at, char* c,
                              char* late) {
  constexpr int kLeft = 2 * PAIR, kRight = kLeft + 1, kLate = 2 - kLeft;
  const auto step = [&]<int A>(int n) __attribute__((always_inline)) {
    const char* a = (p.listed ? p.listed[n].a : p.a + n * p.a_step) + a_at;
    const char* b = (p.listed ? p.listed[n].b : p.b + n * kTileSide * p.b_row) + b_at;
    ProductStep<PAIR, LEGS, A>{tiles, p, a, b}.run();
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
template <int LEGS>
__attribute__((noinline)) void run_product(Tiles& tiles, const BlockProduct& p) {
  char *c = p.c, *late = nullptr;
  int64_t a_block = p.a_first, b_block = 0;
  for (int block = 0; block < p.blocks; ++block) {
    char* lower = c + p.c_row * kTileSide;
    run_rows<0, LEGS>(tiles, p, a_block, b_block, c, late);
    run_rows<1, LEGS>(tiles, p, a_block + p.a_tile, b_block, lower, c);
    late = lower;
    c += p.c_block, a_block += p.a_block, b_block += p.b_block;
  }
  if (late) tiles.store<2>(late, p.c_row), tiles.store<3>(late + kTileRowBytes, p.c_row);
}

// The same for long chains of listed operands: 32 x 32 sums at a time, so that what is loaded meets two of
// the other side. Only their end waits for stores.
__attribute__((noinline)) void run_squares(Tiles& tiles, const BlockProduct& given) {
  const BlockProduct p = given;  // what tiles store might change what is given
  int64_t a_at = p.a_first;
  char* c = p.c;
  for (int block = 0; block < p.blocks; ++block) {
    char* lower = c + p.c_row * kTileSide;
    if (p.accumulate) {
      tiles.load<0>(c, p.c_row), tiles.load<1>(c + kTileRowBytes, p.c_row);
      tiles.load<2>(lower, p.c_row), tiles.load<3>(lower + kTileRowBytes, p.c_row);
    } else {
      tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
    }
    for (int n = 0; n < p.steps; ++n) {
      const char *a = p.listed[n].a + a_at, *b = p.listed[n].b;
      tiles.load<4>(a, p.a_row);
      tiles.load<6>(b, p.b_row), tiles.multiply<0, 4, 6>();
      tiles.load<7>(b + kTileRowBytes, p.b_row), tiles.multiply<1, 4, 7>();
      tiles.load<5>(a + p.a_tile, p.a_row);
      tiles.multiply<2, 5, 6>(), tiles.multiply<3, 5, 7>();
    }
    tiles.store<0>(c, p.c_row), tiles.store<1>(c + kTileRowBytes, p.c_row);
    tiles.store<2>(lower, p.c_row), tiles.store<3>(lower + kTileRowBytes, p.c_row);
    c += p.c_block, a_at += p.a_block;
  }
}

// Where the products of a tile go; null: not asked for. dq has the block's rows, dk and dv hold [width][64].
struct GradientTargets {
  float *dq, *dk, *dv;
};

template <class T>
class GradientMatrices {
  static constexpr int kParts = kTileParts<T>;

 public:
  static constexpr int64_t kPairBytes = kGranule / 2 * kLaneRowBytes;  // of P or dS of a tile, a part
  // `places`: query blocks that will come again and again.
  static int64_t bytes(const AttentionBwdArgs& a, int64_t places) {
    const Layout l(a, places);
    return kVectorBytes + kChunkBytes + align64(l.kept) + align64(l.halves()) + l.fixed() +
           (l.kept + kSpare) * l.slot();
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
    chunk_.p = take(kChunkTiles * kTilePairs), chunk_.ds = take(kChunkTiles * kTilePairs);
    ds_narrow = (float*)take(kParts * kPairBytes);
    packed_ = (uint8_t*)take(align64(layout_.kept));
    queries_started_ = (uint8_t*)take(align64(layout_.halves()));
    staging_ = (BFloat16*)take(layout_.widest());
    ragged_q_ = take(layout_.q), ragged_dout_ = take(layout_.dout);
    k_t_ = take(layout_.q), v_t_ = take(layout_.dout), k_rows_ = take(layout_.q);
    slots_ = memory;
    forget_queries();
  }

  // Of a tile, [64 rows][64 keys]: what the vectors read and write.
  float *scores, *ds, *cap, *ds_narrow;
  int32_t *p_pairs = nullptr, *ds_pairs = nullptr;

  // Another head comes, and its dQ begins.
  void forget_queries() {
    memset(packed_, 0, size_t(layout_.kept));
    memset(queries_started_, 0, size_t(layout_.halves()));
  }
  // dK and dV of 64 keys begin, or go on.
  void begin_keys(bool fresh) { keys_started_[0] = keys_started_[1] = !fresh; }

  // Sums begin with their first product; those that met none are made 0 here, after finish.
  void complete_queries(int64_t place, float* dq) const {
    const int64_t half = kBlockSide * layout_.D;
    for (int i = 0; i < 2; ++i) {
      if (!queries_started_[2 * place + i]) memset(dq + i * half, 0, size_t(half) * 4);
    }
  }
  void complete_keys(float* dk, float* dv) const {
    for (int block = 0; block < 2; ++block) {
      if (keys_started_[block]) continue;
      for (int64_t d = 0; dk && d < layout_.D; ++d) clear_keys(dk + d * kGranule + block * kBlockSide);
      for (int64_t d = 0; dv && d < layout_.Dv; ++d) clear_keys(dv + d * kGranule + block * kBlockSide);
    }
  }

  void pack_keys(const T* k, const T* v, int keys) {
    pack_pairs_of_width(whole_rows(v, a_.v.row, keys, a_.Dv, layout_.Dv, 0), layout_.Dv, v_t_);
    pack_pairs_of_width(whole_rows(k, a_.k.row, keys, a_.D, layout_.D, 0), layout_.D, k_t_);
  }

  // Keys that lie 16 apart, in pairs, after pack_keys. Rows of `bad` are 0.
  void pack_key_rows(const T* k, int keys, uint64_t bad) {
    RowsAt rows{staging_, kParts * layout_.D, layout_.D};
    if constexpr (kParts == 1) rows = whole_rows(k, a_.k.row, keys, a_.D, layout_.D, bad);
    else clear_staged(bad, layout_.D);
    int32_t* out = (int32_t*)k_rows_;
    for (int part = 0; part < kParts; ++part) {
      for (int r = 0; r < kGranule / 2; ++r, out += layout_.D) {
        const BFloat16* low = rows.x + part * rows.part + (r + r / kTileSide * kTileSide) * rows.stride;
        const BFloat16* high = low + kTileSide * rows.stride;
        for (int64_t d = 0; d < layout_.D; d += 2 * kLanes) {
          I32 first, last;
          interleave(low + d, high + d, &first, &last);
          store(out + d, first), store(out + d + kLanes, last);
        }
      }
    }
  }

  // A block of queries; `place` says which of those to come again.
  void load_queries(const T* q, const T* dout, int count, const QueryBlock& block, int64_t place, bool q_t,
                    bool dout_t) {
    const bool keep = place < layout_.kept;
    char* slot = slots_ + (keep ? place : layout_.kept + spare_++ % kSpare) * layout_.slot();
    const bool pack = !keep || !packed_[place];
    q_t_ = slot, dout_t_ = q_t_ + layout_.q;
    char* copy = dout_t_ + layout_.dout;
    q_ = rows_of(q, a_.q.row, count, a_.D, layout_.D, layout_.copies_q ? copy : ragged_q_, layout_.copies_q,
                 pack);
    if (layout_.copies_q) copy += layout_.q;
    dout_ = rows_of(dout, a_.dout.row, count, a_.Dv, layout_.Dv, layout_.copies_dout ? copy : ragged_dout_,
                    layout_.copies_dout, pack);
    if (pack && q_t) {
      pack_columns(kParts > 1 ? without(q_, layout_.D, block.bad_q)
                              : whole_rows(q, a_.q.row, count, a_.D, layout_.D, block.bad_q),
                   layout_.D, q_t_);
    }
    if (pack && dout_t) {
      pack_columns(kParts > 1 ? without(dout_, layout_.Dv, block.bad_dout)
                              : whole_rows(dout, a_.dout.row, count, a_.Dv, layout_.Dv, block.bad_dout),
                   layout_.Dv, dout_t_);
    }
    if (keep) packed_[place] = 1;
  }

  // S and dP of blocks, each 32 rows by two lane vectors.
  void compute_scores(const Segment* segments, int count) {
    if constexpr (kParts == 1) {
      for (int i = 0; i < count; ++i) multiply_q(segments[i]), multiply_dout(segments[i]);
    } else {
      // One after the other: the operands of both are more than the first-level cache.
      for (int i = 0; i < count; ++i) multiply_q(segments[i]);
      for (int i = 0; i < count; ++i) multiply_dout(segments[i]);
    }
  }

  // Whether those are finite.
  bool scores_finite(const Segment& s) const {
    F32 check[2] = {zero(), zero()};
    for (int r = s.first; r < s.last; ++r) {
      for (int c = s.from; c < s.to; ++c) {
        check[0] = fma(load(scores + r * kGranule + c * kLanes), zero(), check[0]);
        check[1] = fma(load(ds + r * kGranule + c * kLanes), zero(), check[1]);
      }
    }
    return !any(is_nan(check[0] + check[1]));
  }

  // Finishes the tile before and finds places for P and dS of the one to come.
  void begin_tile(const GradientTargets& to, int64_t place) {
    compute_deferred();
    if (chunk_.tiles == kChunkTiles) compute_chunk();
    chunk_.to = to, chunk_.place = place;
    p_pairs = (int32_t*)(chunk_.p + chunk_.tiles * kTilePairs);
    ds_pairs = (int32_t*)(chunk_.ds + chunk_.tiles * kTilePairs);
    ++chunk_.tiles;
  }

  // The products of a block for dK and dV, with those of the whole chunk.
  void defer_keys(const Segment& s) {
    const int64_t half = s.first / kBlockSide, block = s.from / 2;
    const int64_t at = half * kHalfPairBytes + block * 2 * kTileRowBytes;
    const int n = chunk_.steps[block]++;
    chunk_.dv[block][n] = {dout_t_ + half * kParts * kTileBytes, (const char*)p_pairs + at};
    chunk_.dk[block][n] = {q_t_ + half * kParts * kTileBytes, (const char*)ds_pairs + at};
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
    p.a_part = kPairBytes, p.b_part = layout_.q / kParts;
    uint8_t& started = queries_started_[2 * chunk_.place + s.first / kBlockSide];
    p.steps = s.to / 2 - from, p.blocks = int(layout_.D / kBlockSide), p.accumulate = started;
    started = 1;
  }

  void keep_awake() { tiles_.keep_awake(); }

  void finish() {
    compute_deferred();
    compute_chunk();
  }

 private:
  static constexpr int64_t kVectorBytes = 3 * kGranule * kLaneRowBytes + kParts * kPairBytes;
  // dK and dV of so many tiles at a time: their sums, in the second-level cache, come and go once.
  // In parts a single tile fills the first-level cache.
  static constexpr int kChunkTiles = kParts == 1 ? 4 : 1;
  static constexpr int64_t kTilePairs = kParts * kPairBytes;
  static constexpr int64_t kChunkBytes = 2 * kChunkTiles * kTilePairs;
  static constexpr int kSpare = kChunkTiles + 1;  // blocks under way: those of a chunk, and the next

  struct Chunk {
    char *p, *ds;
    GradientTargets to;
    int64_t place;        // of the last tile's queries
    int tiles, steps[2];  // live halves of the tiles, by block of 32 keys
    StepOperands dk[2][2 * kChunkTiles], dv[2][2 * kChunkTiles];
  };

  struct Layout {
    int64_t D, Dv, q, dout, places, kept;  // widths padded; q, dout: bytes of 64 rows
    bool copies_q, copies_dout;

    Layout(const AttentionBwdArgs& a, int64_t places)
        : D(padded_width(a.D)), Dv(padded_width(a.Dv)), places(places) {
      q = kGranule * kParts * D * 2, dout = kGranule * kParts * Dv * 2;
      copies_q = kParts > 1 || a.q.row != D || a.D != D;
      copies_dout = kParts > 1 || a.dout.row != Dv || a.Dv != Dv;
      const int64_t most = kKeptBytes / slot();
      kept = places < most ? places : most;
    }
    int64_t slot() const { return q * (1 + copies_q) + dout * (1 + copies_dout); }
    int64_t halves() const { return 2 * (places > 0 ? places : 1); }
    int64_t widest() const { return q > dout ? q : dout; }
    int64_t fixed() const { return widest() + 3 * q + 2 * dout; }
  };

  struct RowsAt {
    const BFloat16* x;
    int64_t stride, part;  // from row to row, from part to part
  };

  // 64 whole rows: those in memory, or padded and without the rows of `bad` in `staging_`.
  RowsAt whole_rows(const T* x, int64_t stride, int count, int64_t width, int64_t wide, uint64_t bad) {
    if (kParts == 1 && count == kGranule && width == wide && !bad) return {(const BFloat16*)x, stride, 0};
    pad_rows(x, stride, count, width, wide, staging_);
    clear_staged(bad, wide);
    return {staging_, kParts * wide, wide};
  }
  // Padded rows without those of `bad`.
  RowsAt without(const RowsAt& rows, int64_t wide, uint64_t bad) {
    if (!bad) return rows;
    memcpy(staging_, rows.x, size_t(kGranule * kParts * wide) * 2);
    clear_staged(bad, wide);
    return {staging_, rows.stride, rows.part};
  }
  void clear_staged(uint64_t bad, int64_t wide) {
    for (; bad; bad &= bad - 1) {
      memset(staging_ + __builtin_ctzll(bad) * kParts * wide, 0, size_t(kParts * wide) * 2);
    }
  }

  // B of S and dP: [part][wide / 2][64 rows], a word holding two neighbours of a row.
  void pack_pairs_of_width(const RowsAt& rows, int64_t wide, char* out) {
    for (int part = 0; part < kParts; ++part, out += wide / 2 * kLaneRowBytes) {
      pack_transposed(kGranule, wide / 2, (float*)out, [&](int row, int64_t d) {
        return load((const float*)(rows.x + row * rows.stride + part * rows.part) + d);
      });
    }
  }

  // A of dK and dV: tiles of 16 columns x 32 rows, to 16 columns two of them, each in parts.
  void pack_columns(const RowsAt& rows, int64_t wide, char* out) {
    for (int64_t d = 0; d < wide; d += kTileSide) {
      for (int r = 0; r < kGranule; r += kBlockSide) {
        for (int part = 0; part < kParts; ++part, out += kTileBytes)
          pack_columns_tile(rows.x + r * rows.stride + part * rows.part + d, rows.stride, out);
      }
    }
  }

  // A of S and dP. A ragged block takes a copy of its own, since no row past the last may be read.
  static RowsAt rows_of(const T* x, int64_t stride, int count, int64_t width, int64_t wide, char* copy,
                        bool copies, bool pack) {
    if (kParts == 1 && !copies && count == kGranule) return {(const BFloat16*)x, stride, 0};
    if (!copies || pack) pad_rows(x, stride, count, width, wide, (BFloat16*)copy);
    return {(const BFloat16*)copy, kParts * wide, wide};
  }

  static BlockProduct scores_product(const RowsAt& rows, int64_t wide, const char* b, const Segment& s,
                                     char* c) {
    BlockProduct p;
    p.a = (const char*)(rows.x + s.first * rows.stride), p.listed = nullptr;
    p.a_row = rows.stride * 2, p.a_tile = kTileSide * p.a_row, p.a_step = kTileRowBytes, p.a_block = 0;
    p.b = b + s.from * kTileRowBytes, p.b_row = kLaneRowBytes, p.b_block = 0;
    p.c = c + s.first * kLaneRowBytes + s.from * kTileRowBytes, p.c_row = kLaneRowBytes, p.c_block = 0;
    p.a_part = rows.part * 2, p.b_part = wide / 2 * kLaneRowBytes;
    p.steps = int(wide / kBlockSide), p.blocks = 1, p.accumulate = false;
    return p;
  }

  void multiply_q(const Segment& s) {
    run_product<kScoreLegs<kParts>>(tiles_, scores_product(q_, layout_.D, k_t_, s, (char*)scores));
  }
  void multiply_dout(const Segment& s) {
    run_product<kScoreLegs<kParts>>(tiles_, scores_product(dout_, layout_.Dv, v_t_, s, (char*)ds));
  }

  void compute_deferred() {
    for (int i = 0; i < waiting_count_; ++i) run_product<kLegs<kParts>>(tiles_, waiting_[i]);
    waiting_count_ = 0;
  }

  void compute_chunk() {
    if constexpr (kParts == 1) {
      for (int block = 0; block < 2; ++block) {
        compute_keys(chunk_.dv[block], block, 0, layout_.Dv, chunk_.to.dv);
        compute_keys(chunk_.dk[block], block, 0, layout_.D, chunk_.to.dk);
      }
    } else {
      // 32 columns at a time: those of Q^T or dO^T stay in the first-level cache for both blocks of keys.
      for (int64_t d = 0; d < layout_.Dv; d += kBlockSide) {
        for (int block = 0; block < 2; ++block)
          compute_keys(chunk_.dv[block], block, d, kBlockSide, chunk_.to.dv);
      }
      for (int64_t d = 0; d < layout_.D; d += kBlockSide) {
        for (int block = 0; block < 2; ++block)
          compute_keys(chunk_.dk[block], block, d, kBlockSide, chunk_.to.dk);
      }
    }
    for (int block = 0; block < 2; ++block) {
      if (chunk_.steps[block]) keys_started_[block] = true;
      chunk_.steps[block] = 0;
    }
    chunk_.tiles = 0;
  }

  static void clear_keys(float* x) {
    for (int i = 0; i < kBlockSide; i += kLanes) store(x + i, zero());
  }

  // Columns [from, from + wide) of what a block of keys gets.
  void compute_keys(const StepOperands* listed, int block, int64_t from, int64_t wide, float* acc) {
    if (!chunk_.steps[block] || !acc) return;
    BlockProduct p;
    p.a = p.b = nullptr, p.listed = listed;
    p.a_row = kTileRowBytes, p.a_tile = 2 * kParts * kTileBytes, p.a_step = 0, p.a_block = 2 * p.a_tile;
    p.a_part = kTileBytes, p.b_part = kPairBytes;
    p.b_row = kLaneRowBytes, p.b_block = 0;
    p.a_first = from / kBlockSide * p.a_block;
    p.c = (char*)acc + from / kBlockSide * kBlockBytes + block * 2 * kTileRowBytes;
    p.c_row = kLaneRowBytes, p.c_block = kBlockBytes;
    p.steps = chunk_.steps[block], p.blocks = int(wide / kBlockSide), p.accumulate = keys_started_[block];
    if constexpr (kParts == 1) run_squares(tiles_, p);
    else run_product<kLegs<kParts>>(tiles_, p);
  }

  const AttentionBwdArgs& a_;
  const Layout layout_;
  uint8_t *packed_, *queries_started_;
  bool keys_started_[2] = {};
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
