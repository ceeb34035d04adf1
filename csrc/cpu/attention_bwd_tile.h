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

#include "attention_bwd_rows.h"

namespace fastattn {
namespace {

// What a tile is computed for: the products, sums of dS over tiles, or both.
enum class TileUse { kProducts, kSums, kBoth };

template <class T, class Rows>
class GradientTile {
  using Product = typename Rows::Product;
  static constexpr int kRows = Rows::kRows;
  static constexpr bool kSplit = Rows::kParts > 1;

 public:
  // `places`: query blocks whose operands are kept for the K granules to come.
  static int64_t floats(const AttentionBwdArgs& a, int64_t places) {
    if constexpr (Rows::kTiles) return Rows::Matrices::bytes(a, places) / 4;
    return kGranule * (a.D + a.Dv + 2 * padded(a.D) + padded(a.Dv) + 5 * kGranule);
  }

  static void clear(float* x, int64_t floats) { memset(x, 0, size_t(floats) * 4); }

  // Which gradients will be asked of it.
  struct Wanted {
    bool dq, dk, dv;
  };

  GradientTile(const AttentionBwdArgs& a, Wanted wanted, int64_t places, float* scratch)
      : a_(a),
        wanted_(wanted),
        wide_(Rows::wide(a.D)),
        wide_v_(Rows::wide(a.Dv)),
        terms_(has_score_terms(a)),
        factor_(terms_ ? 1.f : a.scale * kLog2E),
        unit_(terms_ ? kLog2E : 1.f),
        matrices_(a, places, scratch),
        rows_(a, 0, 0, 0, 1) {
    if constexpr (Rows::kTiles) {
      scores_ = matrices_.scores, ds_ = matrices_.ds, cap_ = matrices_.cap;
      ds_narrow_ = matrices_.ds_narrow;
      return;
    }
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

  // Where gradients are summed up; null: not asked for. dq has the block's rows, dk and dv the granule's
  // keys: [64][wide], or on tiles [wide][64].
  struct Targets {
    float *dq, *dk, *dv;
  };

  // Query blocks of another head come, `places` of them whose sums lie at dq.
  void begin_queries(int64_t places, float* dq) {
    if constexpr (Rows::kTiles) matrices_.forget_queries();
    else clear(dq, places * kGranule * wide_);
  }
  // The sums of the loaded keys begin.
  void begin_keys(bool fresh, float* dk, float* dv) {
    if constexpr (Rows::kTiles) matrices_.begin_keys(fresh);
    else if (fresh) clear(dk, kGranule * wide_), clear(dv, kGranule * wide_v_);
  }
  // Every tile of those has been computed.
  void finish_queries(int64_t places, float* dq) {
    finish();
    if constexpr (Rows::kTiles) {
      for (int64_t n = 0; n < places; ++n) matrices_.complete_queries(n, dq + n * kGranule * wide_);
    }
  }
  void finish_keys(float* dk, float* dv) {
    finish();
    if constexpr (Rows::kTiles) matrices_.complete_keys(dk, dv);
  }
  // Products may wait for the tile after theirs.
  void finish() {
    if constexpr (Rows::kTiles) matrices_.finish();
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

  // P and dS of the loaded keys and a block of queries, `tile` their bits or null, and from them the
  // products; false where no row sees any key. `place` is the block's among those to be kept.
  template <TileUse USE>
  bool compute(int64_t b, int64_t h, int64_t q_block, const uint64_t* tile, int64_t place,
               const Targets& to) {
    if (!load_queries<USE>(b, h, q_block, tile, place)) return false;
    if (a_.dropout) dropout();
    if constexpr (Rows::kTiles) {
      by_blocks<USE>(to, place);
    } else {
      scores<USE>();
      gradients_of<USE>(0, segments_);
      if constexpr (USE != TileUse::kSums) {
        Rows::clear_rows(block_->bad_q, a_.D, q_rows_);
        Rows::clear_rows(block_->bad_dout, a_.Dv, dout_rows_);
        if (to.dv)
          add_keys(kRows == 1 ? (const char*)scores_ : (const char*)p_pairs_, dout_rows_, wide_v_, to.dv);
        if (to.dk) add_keys(kRows == 1 ? (const char*)ds_ : (const char*)ds_pairs_, q_rows_, wide_, to.dk);
        if (to.dq) add_queries(to.dq);
      }
    }
    if constexpr (USE != TileUse::kSums) {
      if (keeps_ || has_bad_rows()) add_bad_rows(to);
    }
    return true;
  }

  // Adds the probabilities of the block's extreme rows, without dropout.
  void add_extremes(int64_t b, int64_t h, int64_t q_block, const uint64_t* tile, double* sums) {
    if (!load_queries<TileUse::kSums>(b, h, q_block, tile, 0)) return;
    const auto add = [&](int from, int to) {
      for (int s = from; s < to; ++s) {
        const Segment& seg = segment_[s];
        for (int r = seg.first; r < seg.last; ++r) {
          if (!(block_->extreme >> r & 1)) continue;
          for (int j = seg.from * kLanes; j < seg.to * kLanes; ++j) {
            if (seen(r, j))
              sums[r] += __builtin_exp2f((scores_[r * kGranule + j] * factor_ - lse_[r]) * unit_);
          }
        }
      }
    };
    if constexpr (Rows::kTiles) {
      matrices_.compute_scores(segment_, segments_);
      for (int s = 0; s < segments_; ++s) {
        repair_scores(segment_[s]);
        score_terms(s, s + 1);
        add(s, s + 1);
      }
    } else {
      scores<TileUse::kSums>();
      add(0, segments_);
    }
  }

  // What is to be asked for while tiles are computed.
  Prefetch& prefetch() { return prefetch_; }

  const QueryRows& rows() const { return rows_; }
  int64_t key() const { return key_; }
  int keys() const { return keys_; }

 private:
  // Masks and operands of a block of queries; false where no row sees any key.
  template <TileUse USE>
  bool load_queries(int64_t b, int64_t h, int64_t q_block, const uint64_t* tile, int64_t place) {
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
    } else {
      for (uint64_t& word : words_) word = ~0ull;
    }
    if (Rows::kTiles) segments_ = blocks_of(words_, count, segment_);
    else if (masked_) segments_ = segments_of(words_, count, segment_);
    else segment_[0] = {0, count, 0, kVectors}, segments_ = 1;
    rows_ = QueryRows(a_, b, h, first, count);
    lse_ = a_.exponent + row, shift_ = a_.shift + row, delta_ = a_.delta + row;
    if (!packed_) pack_keys<USE>();
    if constexpr (Rows::kTiles) {
      constexpr bool kProducts = USE != TileUse::kSums;
      matrices_.load_queries(row_of<T>(a_.q), row_of<T>(a_.dout), count, *block_, place,
                             kProducts && wanted_.dk, kProducts && wanted_.dv);
    }
    return true;
  }

  // The blocks of 32 x 32 of which any row sees anything.
  static int blocks_of(const uint64_t* words, int rows, Segment* out) {
    constexpr int kSide = kGranule / 2, kHalf = kVectors / 2;
    int count = 0;
    for (int first = 0; first < rows; first += kSide) {
      const int last = first + kSide < rows ? first + kSide : rows;
      uint64_t lanes = 0;
      for (int r = first; r < last; ++r) lanes |= words[r];
      if (uint32_t(lanes)) out[count++] = {first, last, 0, kHalf};
      if (lanes >> kSide) out[count++] = {first, last, kHalf, kVectors};
    }
    return count;
  }

  template <TileUse USE>
  void pack_keys() {
    packed_ = true;
    if constexpr (Rows::kTiles) {
      matrices_.finish();
      matrices_.pack_keys(k_, v_, keys_);
      if (USE != TileUse::kSums && wanted_.dq) {
        bad_k_ = rows_not_finite(k_, a_.k.row, keys_, a_.D);
        matrices_.pack_key_rows(k_, keys_, bad_k_);
      }
    } else {
      Rows::pack_lanes(k_, a_.k.row, keys_, a_.D, k_t_);
      Rows::pack_lanes(v_, a_.v.row, keys_, a_.Dv, v_t_);
      if (USE != TileUse::kSums && wanted_.dq) {
        bad_k_ = rows_not_finite(k_, a_.k.row, keys_, a_.D);
        Rows::pack_rows(k_, a_.k.row, keys_, a_.D, bad_k_, k_rows_);
        Rows::clear_rows(bad_k_, a_.D, k_rows_);
      }
    }
  }

  template <class X>
  const X* row_of(const Operand& x) const {
    return (const X*)x.data + rows_.b * x.batch + rows_.h * x.head + rows_.first * x.row;
  }

  void score_terms(int from, int to) {
    if (!terms_) return;
    masked_ |=
        !apply_score_terms_rows<T>(a_, rows_, key_, keys_, segment_ + from, to - from, scores_, cap_, words_);
  }

  // Scores of numbers without parts, where they are seen: an infinity times a part that is 0 is NaN.
  void repair_scores(const Segment& s) {
    if constexpr (kSplit) {
      if (matrices_.scores_finite(s)) return;
      const T *q = row_of<T>(a_.q) + s.first * a_.q.row, *dout = row_of<T>(a_.dout) + s.first * a_.dout.row;
      for (int r = s.first; r < s.last; ++r, q += a_.q.row, dout += a_.dout.row) {
        for (int j = s.from * kLanes; j < last_key(s); ++j) {
          if (!seen(r, j)) continue;
          repair(q, k_ + j * a_.k.row, a_.D, scores_ + r * kGranule + j);
          repair(dout, v_ + j * a_.v.row, a_.Dv, ds_ + r * kGranule + j);
        }
      }
    }
  }
  static void repair(const T* x, const T* y, int64_t width, float* score) {
    if (*score - *score == 0.f) return;
    F32 sum = zero();
    for (int64_t d = 0; d < width; d += kLanes)
      sum = fma(load_n(x + d, width - d), load_n(y + d, width - d), sum);
    *score = reduce_add(sum);
  }

  // On tiles, see attention_bwd_amx.h.
  template <TileUse USE>
  void by_blocks(const Targets& to, int64_t place) {
    constexpr bool kProducts = USE != TileUse::kSums;
    if constexpr (kProducts) {
      matrices_.begin_tile({to.dq, to.dk, to.dv}, place);
      p_pairs_ = matrices_.p_pairs, ds_pairs_ = matrices_.ds_pairs;
    }
    keeps_ = false;
    matrices_.compute_scores(segment_, segments_);
    for (int s = 0; s < segments_; ++s) {
      prefetch_.step();
      repair_scores(segment_[s]);
      score_terms(s, s + 1);
      check_ = zero();
      gradients_of<USE>(s, s + 1);
      prefetch_.step();
      if (kSplit && kProducts && (has_bad_rows() || any(is_nan(check_)))) keep_numbers(segment_[s]);
      if constexpr (kProducts) matrices_.defer_keys(segment_[s]);
      matrices_.keep_awake();  // these blocks take longer than the matrix unit waits
    }
    for (int s = 0; kProducts && s < segments_; ++s) {
      Segment half = segment_[s];
      if (s + 1 < segments_ && segment_[s + 1].first == half.first) ++s, half.from = 0, half.to = kVectors;
      matrices_.defer_queries(half);
    }
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
                                            scores_ + seg.first * kGranule, seg.from, seg.to, kGranule,
                                            kGranule, &prefetch_);
      product<Product, Start::kZero, false>(rows_from(douts), seg.last - seg.first, Rows::steps(a_.Dv), v_t_,
                                            ds_ + seg.first * kGranule, seg.from, seg.to, kGranule, kGranule,
                                            &prefetch_);
    }
    score_terms(0, segments_);
  }

  // keep_[row]: bit j says whether the row keeps key j.
  void dropout() {
    constexpr int kRun = 16;
    for (int j = 0; j < keys_; j += kRun) {
      dropout_words(a_, rows_, key_ + j, keys_ - j < kRun ? keys_ - j : kRun, keep_ + j);
      if constexpr (Rows::kTiles) matrices_.keep_awake();
    }
    for (int j = keys_; j < kGranule; ++j) keep_[j] = 0;
    transpose_bits(keep_);
  }

  // A row's statistics in every lane.
  struct Row {
    F32 lse, shift, delta;

    Row(const GradientTile& t, int r)
        : lse(splat(t.lse_[r])), shift(splat(t.shift_[r])), delta(splat(t.delta_[r])) {}
  };

  template <TileUse USE>
  void gradients_of(int from, int to) {
    for (const Segment* s = segment_ + from; s != segment_ + to; ++s) {
      if (terms_ || block_->extreme) gradients_for<USE, true>(*s);
      else gradients_for<USE, false>(*s);
    }
  }
  template <TileUse USE, bool TERMS>
  void gradients_for(const Segment& s) {
    if (masked_) a_.dropout ? gradients<USE, TERMS, true, true>(s) : gradients<USE, TERMS, true, false>(s);
    else a_.dropout ? gradients<USE, TERMS, false, true>(s) : gradients<USE, TERMS, false, false>(s);
  }

  template <TileUse USE, bool TERMS, bool MASKED, bool DROPOUT>
  void gradients(const Segment seg) {
    const Constants constants(*this);
    F32 check = zero();
    // Tiles take whole halves, two lane vectors at a time.
    constexpr int kStep = Rows::kTiles ? 2 : 1;
    for (int r = seg.first; r < seg.last; r += kRows) {
      const bool both = kRows == 2 && r + 1 < seg.last;
      const Row row0(*this, r), row1(*this, r + both);
      for (int c = seg.from; c < seg.to; c += kStep) {
        F32 p[2][kStep], ds[2][kStep];
#pragma GCC unroll 2
        for (int i = 0; i < kStep; ++i) {
          p[1][i] = ds[1][i] = zero();
          ds[0][i] = element<USE, TERMS, MASKED, DROPOUT>(constants, r, c + i, row0, &p[0][i]);
          if (both) ds[1][i] = element<USE, TERMS, MASKED, DROPOUT>(constants, r + 1, c + i, row1, &p[1][i]);
        }
        if constexpr (USE != TileUse::kSums) put(r, c, p, ds, &check);
      }
    }
    if constexpr (kSplit) check_ = check;
    if constexpr (Rows::kTiles && USE != TileUse::kSums) {
      const F32 none[2][kStep] = {{zero(), zero()}, {zero(), zero()}};
      for (int r = (seg.last + 1) / 2 * 2; r % (kGranule / 2); r += 2) {
        for (int c = seg.from; c < seg.to; c += kStep) put(r, c, none, none, &check);
      }
    }
  }

  // What the loop should not read from memory each time, as it must after whatever the tiles do.
  struct Constants {
    const float *scores, *ds, *cap;
    float factor, unit, dropout_scale;
    bool softcap;

    explicit Constants(const GradientTile& t)
        : scores(t.scores_),
          ds(t.ds_),
          cap(t.cap_),
          factor(t.factor_),
          unit(t.unit_),
          dropout_scale(t.a_.dropout_scale),
          softcap(t.a_.softcap != 0.f) {}
  };

  // dS of a lane vector, and P as it multiplies V.
  template <TileUse USE, bool TERMS, bool MASKED, bool DROPOUT>
  FASTATTN_INLINE F32 element(const Constants& k, int r, int c, const Row& row, F32* p_kept) const {
    const int64_t at = r * kGranule + c * kLanes;
    F32 exponent = fms(load(k.scores + at), splat(k.factor), row.lse);
    // In natural units where there are terms: the lowest finite bias must not overflow.
    if constexpr (TERMS) exponent = fms(exponent, splat(k.unit), row.shift);
    F32 p = exp2<kExpDegree<T>>(exponent), dp = load(k.ds + at);
    if constexpr (MASKED) p = select(lanes(words_[r], c), p, zero());
    *p_kept = p;
    if constexpr (DROPOUT) {
      const Mask keep = lanes(keep_[r], c);
      *p_kept = select(keep, p * splat(k.dropout_scale), zero());
      dp = select(keep, dp * splat(k.dropout_scale), zero());
    }
    F32 ds = p * (dp - row.delta);
    if constexpr (MASKED) ds = select(lanes(words_[r], c), ds, zero());
    if constexpr (USE != TileUse::kProducts) {
      if (sum_tile_) store(sum_tile_ + at, load(sum_tile_ + at) + ds);
      if (sum_columns_) store(sum_columns_ + c * kLanes, load(sum_columns_ + c * kLanes) + ds);
    }
    if (USE != TileUse::kSums && TERMS && k.softcap) {
      ds = ds * load(k.cap + at);
      if constexpr (MASKED) ds = select(lanes(words_[r], c), ds, zero());  // 0 * the slope at a hidden NaN
    }
    return ds;
  }

  static FASTATTN_INLINE Mask lanes(uint64_t word, int c) {
    return mask_of_bits(uint32_t(word >> (c * kLanes)));
  }

  template <int N>
  FASTATTN_INLINE void put(int r, int c, const F32 (&p)[2][N], const F32 (&ds)[2][N], F32* check) {
    if constexpr (kRows == 1) {
      store(scores_ + r * kGranule + c * kLanes, p[0][0]);
      store(ds_ + r * kGranule + c * kLanes, ds[0][0]);
    } else if constexpr (Rows::kTiles) {
      const int64_t at = r / 2 * kGranule + c * kLanes;
      Rows::put_pairs(p, check, p_pairs_ + at);
      Rows::put_pairs(ds, check, ds_pairs_ + at,
                      (int32_t*)ds_narrow_ + r * (kGranule / 2) + c * (kLanes / 2));
    } else {
#ifdef FASTATTN_HAS_DOT2
      store(p_pairs_ + r / 2 * kGranule + c * kLanes, pack_pairs(p[0][0], p[1][0]));
      store(ds_pairs_ + r / 2 * kGranule + c * kLanes, pack_pairs(ds[0][0], ds[1][0]));
      BFloat16* narrow = (BFloat16*)ds_narrow_ + r * kGranule + c * kLanes;
      store(narrow, ds[0][0]);
      store(narrow + kGranule, ds[1][0]);  // past the last row: one of the 64 that nobody reads
#endif
    }
  }

  // P and dS once more, in fp32 over the scores they came from, for add_bad_rows. Those that have no parts
  // are 0 in the products.
  void keep_numbers(const Segment& s) {
    if (!keeps_) memset(lost_, 0, sizeof lost_);
    keeps_ = true;
    a_.dropout ? keep_numbers<true>(s) : keep_numbers<false>(s);
  }
  template <bool DROPOUT>
  void keep_numbers(const Segment& s) {
    if constexpr (kSplit) {
      const Constants constants(*this);
      for (int r = s.first; r < s.last; r += 2) {
        for (int c = s.from; c < s.to; c += 2) {
          F32 p[2][2], ds[2][2], check = zero();
          for (int i = 0; i < 4; ++i) {
            F32 &weight = p[i / 2][i % 2], &gradient = ds[i / 2][i % 2];
            weight = gradient = zero();
            const int row = r + i / 2, lane = c + i % 2;
            if (row == s.last) continue;
            gradient = element<TileUse::kProducts, true, true, DROPOUT>(constants, row, lane, Row(*this, row),
                                                                        &weight);
            store(scores_ + row * kGranule + lane * kLanes, weight);
            store(ds_ + row * kGranule + lane * kLanes, gradient);
            weight = without_lost(weight, &lost_[0][row], lane);
            gradient = without_lost(gradient, &lost_[1][row], lane);
          }
          put(r, c, p, ds, &check);
        }
      }
    }
  }
  static F32 without_lost(F32 x, uint64_t* lost, int lane) {
    const Mask none = Rows::has_no_parts(x);
    *lost |= uint64_t(bits_of(none)) << (lane * kLanes);
    return select(none, zero(), x);
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

  // acc[row][column] += dS K, for the block's rows.
  void add_queries(float* acc) const {
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
  }

  bool has_bad_rows() const { return (bad_k_ | block_->bad_q | block_->bad_dout) != 0; }

  // What rows that are not finite, and P and dS that are not, add to the gradients where they are seen.
  void add_bad_rows(const Targets& to) {
    finish();
    const T *q = row_of<T>(a_.q), *dout = row_of<T>(a_.dout);
    const int64_t key_step = Rows::kTiles ? 1 : wide_, key_step_v = Rows::kTiles ? 1 : wide_v_;
    const int64_t step = Rows::kTiles ? kGranule : 1;
    for (int r = 0; r < rows_.count; ++r) {
      const uint64_t lost_p = keeps_ ? lost_[0][r] : 0, lost_ds = keeps_ ? lost_[1][r] : 0;
      const uint64_t for_k = to.dq ? bad_k_ | lost_ds : 0;
      const uint64_t for_q = !to.dk ? 0 : block_->bad_q >> r & 1 ? ~0ull : lost_ds;
      const uint64_t for_dout = !to.dv ? 0 : block_->bad_dout >> r & 1 ? ~0ull : lost_p;
      for (uint64_t keys = words_[r] & (for_k | for_q | for_dout); keys; keys &= keys - 1) {
        const int j = __builtin_ctzll(keys);
        if (for_k >> j & 1) add_row(ds_at(r, j), k_ + j * a_.k.row, a_.D, to.dq + r * wide_, 1);
        if (for_q >> j & 1) add_row(ds_at(r, j), q + r * a_.q.row, a_.D, to.dk + j * key_step, step);
        if (for_dout >> j & 1)
          add_row(p_at(r, j), dout + r * a_.dout.row, a_.Dv, to.dv + j * key_step_v, step);
      }
    }
  }

  bool seen(int r, int j) const { return words_[r] >> j & 1; }
  float ds_at(int r, int j) const {
    if (kRows == 1 || kSplit) return ds_[r * kGranule + j];
    if (Rows::kTiles) j = j / 32 * 32 + j % 16 * 2 + j / 16 % 2;  // see put_pairs
    return as_float(((const BFloat16*)ds_narrow_)[r * kGranule + j]);
  }
  float p_at(int r, int j) const {
    return kRows == 1 || kSplit ? scores_[r * kGranule + j]
                                : as_float(((const BFloat16*)p_pairs_)[(r / 2 * kGranule + j) * 2 + r % 2]);
  }
  static void add_row(float factor, const T* row, int64_t width, float* acc, int64_t step) {
    for (int64_t d = 0; d < width; ++d) acc[d * step] += factor * as_float(row[d]);
  }

  const AttentionBwdArgs& a_;
  const Wanted wanted_;
  const int64_t wide_, wide_v_;
  const bool terms_;
  const float factor_, unit_;
  typename Rows::Matrices matrices_;
  float *k_t_, *v_t_, *k_rows_, *q_rows_, *dout_rows_, *scores_, *ds_, *cap_, *ds_narrow_;
  int32_t *p_pairs_, *ds_pairs_;

  int64_t key_ = 0;
  int keys_ = 0;
  const T *k_ = nullptr, *v_ = nullptr;
  bool packed_ = false;
  uint64_t bad_k_ = 0;

  Prefetch prefetch_;
  QueryRows rows_;
  const QueryBlock* block_ = nullptr;
  const float *lse_ = nullptr, *shift_ = nullptr, *delta_ = nullptr;
  bool masked_ = false;
  // Of numbers in parts: NaN once P or dS of a segment has none; whether scores_ and ds_ hold P and dS of the
  // tile, and where these have no parts.
  F32 check_ = zero();
  bool keeps_ = false;
  uint64_t lost_[2][kGranule];
  float *sum_tile_ = nullptr, *sum_columns_ = nullptr;
  int segments_ = 0;
  Segment segment_[4];
  alignas(64) uint64_t words_[kGranule];
  uint64_t keep_[kGranule];
};

}  // namespace
}  // namespace fastattn
