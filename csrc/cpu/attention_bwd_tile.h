// Attention backward, one tile: 64 query rows against 64 keys of one head.
//
//   S = Q K^T, P = exp2(S - lse), dP = dO V^T, dS = P * (dP - delta)
//   dV += P^T dO, dK += dS^T Q, dQ += dS K                        (FlashAttention-2's backward, unscaled)
//
// Lanes are keys for S and dP, columns of the gradient for the rest, so K^T and V^T are all that is
// transposed, once a K granule. Statistics are known from the forward: nothing is reduced across lanes.
//
// Hidden NaN: P and dS are selected, never multiplied by a mask, and rows of K, Q and dO that are not finite
// are 0 in the products above; they are then added one by one where they are seen.
#pragma once

#include "attention.h"
#include "attention_bwd_args.h"

namespace fastattn {
namespace {

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Which of `rows` rows hold a number that is not finite.
template <class T>
uint64_t rows_not_finite(const T* x, int64_t stride, int rows, int64_t width) {
  uint64_t bad = 0;
  for (int r = 0; r < rows; ++r, x += stride) {
    F32 check = zero();
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) check = fma(load(x + d), zero(), check);
    if (d < width) check = fma(load_n(x + d, width - d), zero(), check);
    bad |= uint64_t(any(is_nan(check))) << r;
  }
  return bad;
}

// The products on fp32 operands. Rows are widened to fp32, `padded(width)` apart.
template <class T>
struct WidenedRows {
  using Product = FmaProduct;
  static constexpr int kRows = 1;  // rows of an operand that one step of a product takes

  static void pack_lanes(const T* x, int64_t stride, int count, int64_t width, float* out) {
    WidenedOperands<T>::pack_q(x, stride, count, width, out);
  }
  static int64_t steps(int64_t width) { return width; }
  static void pack_rows(const T* x, int64_t stride, int count, int64_t width, uint64_t, float* out) {
    for (int r = 0; r < count; ++r, x += stride) {
      for (int64_t d = 0; d < width; d += kLanes, out += kLanes) store(out, load_n(x + d, width - d));
    }
  }
  static void clear_rows(uint64_t bad, int64_t width, float* packed) {
    for (int r = 0; bad; ++r, bad >>= 1) {
      if (bad & 1) memset(packed + r * padded(width), 0, padded(width) * 4);
    }
  }
  static Broadcast rows(const T*, int64_t, const float* packed, int64_t width) {
    return {(const char*)packed, padded(width) * 4, 4};
  }
};

#ifdef FASTATTN_HAS_DOT2
// The products on bf16 pairs; D and Dv are even. Q and dO are read in place and as pairs of adjacent rows.
struct PairedRows {
  using Product = Dot2Product;
  static constexpr int kRows = 2;

  static void pack_lanes(const BFloat16* x, int64_t stride, int count, int64_t width, float* out) {
    PairedOperands::pack_q(x, stride, count, width, out);
  }
  static int64_t steps(int64_t width) { return width / 2; }
  static void pack_rows(const BFloat16* x, int64_t stride, int count, int64_t width, uint64_t bad,
                        float* packed) {
    int32_t* out = (int32_t*)packed;
    const int64_t wide = padded(width);
    for (int r = 0; r < count; r += 2, x += 2 * stride, out += wide) {
      const bool low = !(bad >> r & 1), high = r + 1 < count && !(bad >> (r + 1) & 1);
      int64_t d = 0;
      if (low && high) {
        for (; d + kLanes <= width; d += kLanes) store(out + d, interleave(x + d, x + stride + d));
      }
      for (; d < width; ++d)
        out[d] = int32_t((low ? x[d].bits : 0) | (high ? uint32_t(x[stride + d].bits) << 16 : 0));
      for (; d < wide; ++d) out[d] = 0;
    }
  }
  static void clear_rows(uint64_t, int64_t, float*) {}
  static Broadcast rows(const BFloat16* x, int64_t stride, const float*, int64_t) {
    return {(const char*)x, stride * 2, 4};
  }
};
#endif

// What a tile is computed for: the products, sums of dS over tiles, or both.
enum class TileUse { kProducts, kSums, kBoth };

template <class T, class Rows>
class GradientTile {
  using Product = typename Rows::Product;
  static constexpr int kRows = Rows::kRows;

 public:
  static int64_t floats(const AttentionBwdArgs& a) {
    return kGranule * (a.D + a.Dv + 2 * padded(a.D) + padded(a.Dv) + 5 * kGranule);
  }

  // Which gradients will be asked of it.
  struct Wanted {
    bool dq, dk, dv;
  };

  GradientTile(const AttentionBwdArgs& a, Wanted wanted, float* scratch)
      : a_(a),
        wanted_(wanted),
        wide_(padded(a.D)),
        wide_v_(padded(a.Dv)),
        terms_(has_score_terms(a)),
        factor_(terms_ ? 1.f : a.scale * kLog2E),
        unit_(terms_ ? kLog2E : 1.f),
        rows_(a, 0, 0, 0, 1) {
    const auto take = [&](int64_t width) {
      float* at = scratch;
      scratch += kGranule * width;
      return at;
    };
    k_t_ = take(a.D), v_t_ = take(a.Dv), k_rows_ = take(wide_), q_rows_ = take(wide_);
    dout_rows_ = take(wide_v_);
    scores_ = take(kGranule), ds_ = take(kGranule), cap_ = take(kGranule);
    p_pairs_ = (int32_t*)take(kGranule / 2), ds_pairs_ = (int32_t*)take(kGranule / 2);
    ds_narrow_ = take(kGranule / 2);
  }

  // The K granule of the tiles to come.
  void load_keys(int64_t b, int64_t kv_head, int64_t k_block) {
    key_ = k_block * kGranule;
    keys_ = int(a_.Sk - key_ < kGranule ? a_.Sk - key_ : kGranule);
    k_ = (const T*)a_.k.data + b * a_.k.batch + kv_head * a_.k.head + key_ * a_.k.row;
    v_ = (const T*)a_.v.data + b * a_.v.batch + kv_head * a_.v.head + key_ * a_.v.row;
    packed_ = false;
  }

  // Where tiles computed for sums add dS, that is the bias's gradient: [row][64] and by key, [64]; each may
  // be null.
  void sum_into(float* tile, float* columns) { sum_tile_ = tile, sum_columns_ = columns; }

  // P and dS of the loaded keys and a block of queries, `tile` their bits or null; false where no row sees
  // any key.
  template <TileUse USE>
  bool compute(int64_t b, int64_t h, int64_t q_block, const uint64_t* tile) {
    if (!load_queries<USE>(b, h, q_block, tile)) return false;
    if (a_.dropout) dropout();
    if (masked_) a_.dropout ? gradients<USE, true, true>() : gradients<USE, true, false>();
    else a_.dropout ? gradients<USE, false, true>() : gradients<USE, false, false>();
    if constexpr (USE != TileUse::kSums) {
      Rows::clear_rows(block_->bad_q, a_.D, q_rows_);
      Rows::clear_rows(block_->bad_dout, a_.Dv, dout_rows_);
    }
    return true;
  }

  // Adds the probabilities of the block's extreme rows, without dropout.
  void add_extremes(int64_t b, int64_t h, int64_t q_block, const uint64_t* tile, double* sums) {
    if (!load_queries<TileUse::kSums>(b, h, q_block, tile)) return;
    for (int r = 0; r < rows_.count; ++r) {
      if (!(block_->extreme >> r & 1)) continue;
      for (int j = 0; j < keys_; ++j) {
        if (!seen(r, j)) continue;
        const float s = scores_[r * kGranule + j];
        sums[r] += __builtin_exp2f((s * factor_ - lse_[r]) * unit_);
      }
    }
  }

  const QueryRows& rows() const { return rows_; }
  int64_t key() const { return key_; }
  int keys() const { return keys_; }

  // acc[row][column] += dS K, for the block's rows.
  void add_dq(float* acc) const {
    const char* ds = kRows == 1 ? (const char*)ds_ : (const char*)ds_narrow_;
    constexpr int64_t kRowBytes = kGranule * 4 / kRows;
    for (int s = 0; s < segments_; ++s) {
      const Segment& seg = segment_[s];
      const int from = seg.from * kLanes, to = last_key(seg);
      const Broadcast part{ds + seg.first * kRowBytes + from / kRows * 4, kRowBytes, 4};
      product<Product, Start::kAccumulate, false>(part, seg.last - seg.first, (to - from + kRows - 1) / kRows,
                                                  k_rows_ + from / kRows * wide_, acc + seg.first * wide_, 0,
                                                  int(wide_ / kLanes), wide_, wide_);
    }
    uint64_t bad = bad_k_;
    for (int j = 0; bad; ++j, bad >>= 1) {
      if (!(bad & 1)) continue;
      for (int r = 0; r < rows_.count; ++r) {
        if (seen(r, j)) add_row(ds_at(r, j), k_ + j * a_.k.row, a_.D, acc + r * wide_);
      }
    }
  }

  // acc[key][column] += dS^T Q.
  void add_dk(float* acc) const {
    add_keys(kRows == 1 ? (const char*)ds_ : (const char*)ds_pairs_, q_rows_, wide_, acc);
    const T* q = row_of<T>(a_.q);
    uint64_t bad = block_->bad_q;
    for (int r = 0; bad; ++r, bad >>= 1) {
      if (!(bad & 1)) continue;
      for (int j = 0; j < keys_; ++j) {
        if (seen(r, j)) add_row(ds_at(r, j), q + r * a_.q.row, a_.D, acc + j * wide_);
      }
    }
  }

  // acc[key][column] += P^T dO.
  void add_dv(float* acc) const {
    add_keys(kRows == 1 ? (const char*)scores_ : (const char*)p_pairs_, dout_rows_, wide_v_, acc);
    const T* dout = row_of<T>(a_.dout);
    uint64_t bad = block_->bad_dout;
    for (int r = 0; bad; ++r, bad >>= 1) {
      if (!(bad & 1)) continue;
      for (int j = 0; j < keys_; ++j) {
        if (seen(r, j)) add_row(p_at(r, j), dout + r * a_.dout.row, a_.Dv, acc + j * wide_v_);
      }
    }
  }

 private:
  // Masks and scores of a block of queries; false where no row sees any key.
  template <TileUse USE>
  bool load_queries(int64_t b, int64_t h, int64_t q_block, const uint64_t* tile) {
    const int64_t row = (b * a_.Hq + h) * a_.Sq + q_block * kGranule;
    block_ = &a_.blocks[(b * a_.Hq + h) * a_.q_blocks() + q_block];
    const KeyExtent extent{block_->seen_lo, block_->seen_hi, block_->all_lo, block_->all_hi};
    if (extent.misses(key_, keys_)) return false;
    const int64_t first = q_block * kGranule;
    const int count = int(a_.Sq - first < kGranule ? a_.Sq - first : kGranule);
    // Lanes past the last key must hold 0, so a ragged granule is a partial one.
    masked_ = tile || keys_ < kGranule || !extent.covers(key_, keys_);
    if (masked_) {
      const BlockMask mask(a_, b, h, first, count);
      if (!mask.row_words({key_, keys_, true, tile}, words_)) return false;
      segments_ = segments_of(words_, count, segment_);
    } else {
      for (uint64_t& word : words_) word = ~0ull;
      segment_[0] = {0, count, 0, kVectors}, segments_ = 1;
    }
    rows_ = QueryRows(a_, b, h, first, count);
    lse_ = a_.exponent + row, shift_ = a_.shift + row, delta_ = a_.delta + row;
    if (!packed_) pack_keys<USE>();
    scores<USE>();
    if (terms_) {
      masked_ |=
          !apply_score_terms_rows<T>(a_, rows_, key_, keys_, segment_, segments_, scores_, cap_, words_);
    }
    return true;
  }

  template <TileUse USE>
  void pack_keys() {
    packed_ = true;
    Rows::pack_lanes(k_, a_.k.row, keys_, a_.D, k_t_);
    Rows::pack_lanes(v_, a_.v.row, keys_, a_.Dv, v_t_);
    if (USE != TileUse::kSums && wanted_.dq) {
      bad_k_ = rows_not_finite(k_, a_.k.row, keys_, a_.D);
      Rows::pack_rows(k_, a_.k.row, keys_, a_.D, bad_k_, k_rows_);
      Rows::clear_rows(bad_k_, a_.D, k_rows_);
    }
  }

  template <class X>
  const X* row_of(const Operand& x) const {
    return (const X*)x.data + rows_.b * x.batch + rows_.h * x.head + rows_.first * x.row;
  }

  // S to `scores`, dP to `ds`.
  template <TileUse USE>
  void scores() {
    const T *q = row_of<T>(a_.q), *dout = row_of<T>(a_.dout);
    if (kRows == 1 || (USE != TileUse::kSums && wanted_.dk)) {
      Rows::pack_rows(q, a_.q.row, rows_.count, a_.D, block_->bad_q, q_rows_);
    }
    if (kRows == 1 || (USE != TileUse::kSums && wanted_.dv)) {
      Rows::pack_rows(dout, a_.dout.row, rows_.count, a_.Dv, block_->bad_dout, dout_rows_);
    }
    const Broadcast queries = Rows::rows(q, a_.q.row, q_rows_, a_.D);
    const Broadcast douts = Rows::rows(dout, a_.dout.row, dout_rows_, a_.Dv);
    for (int s = 0; s < segments_; ++s) {
      const Segment& seg = segment_[s];
      const auto rows_from = [&](const Broadcast& x) {
        return Broadcast{x.data + seg.first * x.row_bytes, x.row_bytes, x.step_bytes};
      };
      product<Product, Start::kZero, false>(rows_from(queries), seg.last - seg.first, Rows::steps(a_.D), k_t_,
                                            scores_ + seg.first * kGranule, seg.from, seg.to);
      product<Product, Start::kZero, false>(rows_from(douts), seg.last - seg.first, Rows::steps(a_.Dv), v_t_,
                                            ds_ + seg.first * kGranule, seg.from, seg.to);
    }
  }

  // keep_[row]: bit j says whether the row keeps key j.
  void dropout() {
    dropout_words(a_, rows_, key_, keys_, keep_);
    for (int j = keys_; j < kGranule; ++j) keep_[j] = 0;
    transpose_bits(keep_);
  }

  // A row's statistics in every lane.
  struct Row {
    F32 lse, shift, delta;

    Row(const GradientTile& t, int r)
        : lse(splat(t.lse_[r])), shift(splat(t.shift_[r])), delta(splat(t.delta_[r])) {}
  };

  template <TileUse USE, bool MASKED, bool DROPOUT>
  void gradients() {
    for (int s = 0; s < segments_; ++s) {
      const Segment seg = segment_[s];
      for (int r = seg.first; r < seg.last; r += kRows) {
        const bool both = kRows == 2 && r + 1 < seg.last;
        const Row row0(*this, r), row1(*this, r + both);
        for (int c = seg.from; c < seg.to; ++c) {
          F32 p0, p1 = zero(), ds1 = zero(), ds0 = element<USE, MASKED, DROPOUT>(r, c, row0, &p0);
          if (both) ds1 = element<USE, MASKED, DROPOUT>(r + 1, c, row1, &p1);
          if constexpr (USE != TileUse::kSums) put(r, c, p0, p1, ds0, ds1);
        }
      }
    }
  }

  // dS of a lane vector, and P as it multiplies V.
  template <TileUse USE, bool MASKED, bool DROPOUT>
  FASTATTN_INLINE F32 element(int r, int c, const Row& row, F32* p_kept) const {
    const int64_t at = r * kGranule + c * kLanes;
    // In natural units where there are terms: the lowest finite bias must not overflow.
    const F32 distance = fms(load(scores_ + at), splat(factor_), row.lse);
    F32 p = exp2<kExpDegree<T>>(fms(distance, splat(unit_), row.shift)), dp = load(ds_ + at);
    if constexpr (MASKED) p = select(lanes(words_[r], c), p, zero());
    *p_kept = p;
    if constexpr (DROPOUT) {
      const Mask keep = lanes(keep_[r], c);
      *p_kept = select(keep, p * splat(a_.dropout_scale), zero());
      dp = select(keep, dp * splat(a_.dropout_scale), zero());
    }
    F32 ds = p * (dp - row.delta);
    if constexpr (MASKED) ds = select(lanes(words_[r], c), ds, zero());
    if constexpr (USE != TileUse::kProducts) {
      if (sum_tile_) store(sum_tile_ + at, load(sum_tile_ + at) + ds);
      if (sum_columns_) store(sum_columns_ + c * kLanes, load(sum_columns_ + c * kLanes) + ds);
    }
    if (USE != TileUse::kSums && a_.softcap != 0.f) {
      ds = ds * load(cap_ + at);
      if constexpr (MASKED) ds = select(lanes(words_[r], c), ds, zero());  // 0 * the slope at a hidden NaN
    }
    return ds;
  }

  static FASTATTN_INLINE Mask lanes(uint64_t word, int c) {
    return mask_of_bits(uint32_t(word >> (c * kLanes)));
  }

  FASTATTN_INLINE void put(int r, int c, F32 p0, [[maybe_unused]] F32 p1, F32 ds0, [[maybe_unused]] F32 ds1) {
    if constexpr (kRows == 1) {
      store(scores_ + r * kGranule + c * kLanes, p0);
      store(ds_ + r * kGranule + c * kLanes, ds0);
    } else {
#ifdef FASTATTN_HAS_DOT2
      store(p_pairs_ + r / 2 * kGranule + c * kLanes, pack_pairs(p0, p1));
      store(ds_pairs_ + r / 2 * kGranule + c * kLanes, pack_pairs(ds0, ds1));
      BFloat16* narrow = (BFloat16*)ds_narrow_ + r * kGranule + c * kLanes;
      store(narrow, ds0);
      store(narrow + kGranule, ds1);  // past the last row: one of the 64 that nobody reads
#endif
    }
  }

  int last_key(const Segment& seg) const { return seg.to * kLanes < keys_ ? seg.to * kLanes : keys_; }

  // acc[key] += x^T rows, x being P or dS with the queries (or pairs of them) as its rows.
  void add_keys(const char* x, const float* rows, int64_t wide, float* acc) const {
    for (int s = 0; s < segments_; ++s) {
      const Segment& seg = segment_[s];
      const int from = seg.from * kLanes, first = seg.first / kRows;
      const Broadcast part{x + (first * kGranule + from) * 4, 4, kGranule * 4};
      product<Product, Start::kAccumulate, true>(
          part, last_key(seg) - from, (seg.last - seg.first + kRows - 1) / kRows, rows + first * wide,
          acc + from * wide, 0, int(wide / kLanes), wide, wide);
    }
  }

  bool seen(int r, int j) const { return words_[r] >> j & 1; }
  float ds_at(int r, int j) const {
    return kRows == 1 ? ds_[r * kGranule + j] : as_float(((const BFloat16*)ds_narrow_)[r * kGranule + j]);
  }
  float p_at(int r, int j) const {
    return kRows == 1 ? scores_[r * kGranule + j]
                      : as_float(((const BFloat16*)p_pairs_)[(r / 2 * kGranule + j) * 2 + r % 2]);
  }
  static void add_row(float factor, const T* row, int64_t width, float* acc) {
    for (int64_t d = 0; d < width; ++d) acc[d] += factor * as_float(row[d]);
  }

  const AttentionBwdArgs& a_;
  const Wanted wanted_;
  const int64_t wide_, wide_v_;
  const bool terms_;
  const float factor_, unit_;
  float *k_t_, *v_t_, *k_rows_, *q_rows_, *dout_rows_, *scores_, *ds_, *cap_, *ds_narrow_;
  int32_t *p_pairs_, *ds_pairs_;

  int64_t key_ = 0;
  int keys_ = 0;
  const T *k_ = nullptr, *v_ = nullptr;
  bool packed_ = false;
  uint64_t bad_k_ = 0;

  QueryRows rows_;
  const QueryBlock* block_ = nullptr;
  const float *lse_ = nullptr, *shift_ = nullptr, *delta_ = nullptr;
  bool masked_ = false;
  float *sum_tile_ = nullptr, *sum_columns_ = nullptr;
  int segments_ = 0;
  Segment segment_[4];
  alignas(64) uint64_t words_[kGranule];
  uint64_t keep_[kGranule];
};

}  // namespace
}  // namespace fastattn
