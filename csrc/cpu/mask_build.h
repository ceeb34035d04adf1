// Builds the block lists and bit tiles of a mask from its algebra, granule by granule.
//
// The mask comes as a tree in postfix order: leaves (an interval a row, a set of keys, distances that a
// number divides, equal ids, block layouts, lists of blocks, granules already known) under AND, OR and NOT.
// For each granule of rows every leaf writes a status a granule of keys (0 empty, 1 partial, 2 full; partial
// may be claimed too often, never too rarely), which AND, OR and NOT join as minimum, maximum and 2 - x. A
// granule that is still partial gets its tile: by the keys of its leaves where an equal granule was made
// before, else from the leaves' words. Memory is a row of statuses a node, the tiles and the list, never rows
// x keys.
//
// Compiled in the baseline instruction set: it uses the standard library.
#pragma once

#include <memory>

#include "mask_tiles.h"

namespace fastattn {

struct MaskShape {
  int64_t B, H, Sq, Sk;
  int64_t n_q() const { return granules_of(Sq); }
  int64_t n_k() const { return granules_of(Sk); }
};

// The granule of rows that is being built.
struct GranuleRow {
  int64_t b, h, q;
  int64_t first_row, rows;
};

// A tensor of the tree: contiguous but for batch and head, whose strides are 0 where they do not vary.
template <class T>
struct Planes {
  const T* data = nullptr;
  int64_t batch = 0, head = 0;
  const T* of(const GranuleRow& g) const { return data + g.b * batch + g.h * head; }
};

class MaskNode {
 public:
  explicit MaskNode(const MaskShape& shape) : shape_(shape), status_(shape.n_k()) {}
  virtual ~MaskNode() = default;

  // Writes the statuses of a granule of rows; called before anything below.
  virtual void begin(const GranuleRow& row) = 0;
  // The words of a granule whose status is partial.
  virtual void fill(int64_t k, uint64_t* tile) = 0;
  // Appends what tells its partial granules apart; false where nothing short does.
  virtual bool key(int64_t k, std::vector<uint64_t>* out) const = 0;

  const uint8_t* status() const { return status_.data(); }

  void words(int64_t k, uint64_t* tile) {
    if (status_[k] == 1) return fill(k, tile);
    std::fill(tile, tile + kSide, status_[k] ? kAllKeys : 0);
  }
  bool append_key(int64_t k, std::vector<uint64_t>* out) const {
    out->push_back(status_[k]);
    return status_[k] != 1 || key(k, out);
  }

 protected:
  int64_t key_end(int64_t k) const { return std::min((k + 1) * kSide, shape_.Sk); }

  MaskShape shape_;
  std::vector<uint8_t> status_;
};

using NodePointer = std::unique_ptr<MaskNode>;

class NotNode : public MaskNode {
 public:
  NotNode(const MaskShape& s, NodePointer child) : MaskNode(s), child_(std::move(child)) {}
  void begin(const GranuleRow& row) override {
    child_->begin(row);
    for (size_t k = 0; k < status_.size(); ++k) status_[k] = 2 - child_->status()[k];
  }
  void fill(int64_t k, uint64_t* tile) override {
    child_->fill(k, tile);
    for (int r = 0; r < kSide; ++r) tile[r] = ~tile[r];
  }
  bool key(int64_t k, std::vector<uint64_t>* out) const override { return child_->key(k, out); }

 private:
  NodePointer child_;
};

class JoinNode : public MaskNode {
 public:
  JoinNode(const MaskShape& s, bool every, std::vector<NodePointer> children)
      : MaskNode(s), every_(every), children_(std::move(children)) {}
  void begin(const GranuleRow& row) override {
    std::fill(status_.begin(), status_.end(), every_ ? 2 : 0);
    uint8_t* to = status_.data();
    for (const NodePointer& child : children_) {
      child->begin(row);
      const uint8_t* from = child->status();
      if (every_) {
        for (size_t k = 0; k < status_.size(); ++k) to[k] = std::min(to[k], from[k]);
      } else {
        for (size_t k = 0; k < status_.size(); ++k) to[k] = std::max(to[k], from[k]);
      }
    }
  }
  void fill(int64_t k, uint64_t* tile) override {
    uint64_t part[kSide];
    bool first = true;
    for (const NodePointer& child : children_) {
      if (child->status()[k] == (every_ ? 2 : 0)) continue;
      child->words(k, first ? tile : part);
      for (int r = 0; r < kSide && !first; ++r) tile[r] = every_ ? tile[r] & part[r] : tile[r] | part[r];
      first = false;
    }
  }
  bool key(int64_t k, std::vector<uint64_t>* out) const override {
    for (const NodePointer& child : children_) {
      if (!child->append_key(k, out)) return false;
    }
    return true;
  }

 private:
  bool every_;
  std::vector<NodePointer> children_;
};

// Row i sees the keys of [i + band_lo, i + band_hi] and of [lo, hi), each bound optional, lo and hi a number
// or a tensor int32 [.., .., Sq or 1].
struct RangeBounds {
  bool has_band = false, has_number = false;
  int64_t band = 0, number = 0;
  Planes<int32_t> tensor;
  int64_t row = 0;  // stride of the tensor's rows, 0 where it has one
};

class RangeNode : public MaskNode {
 public:
  RangeNode(const MaskShape& s, const RangeBounds& lo, const RangeBounds& hi)
      : MaskNode(s), from_(lo), to_(hi) {
    const bool bands = lo.has_band || hi.has_band;
    band_only_ = bands && !lo.tensor.data && !hi.tensor.data && !lo.has_number && !hi.has_number;
    one_interval_ = !bands && !(lo.tensor.data && lo.row) && !(hi.tensor.data && hi.row);
  }
  void begin(const GranuleRow& row) override {
    row_ = row;
    int64_t first = shape_.Sk, last = 0, inner_first = 0, inner_last = shape_.Sk;
    const int32_t* from = from_.tensor.data ? from_.tensor.of(row) : nullptr;
    const int32_t* to = to_.tensor.data ? to_.tensor.of(row) : nullptr;
    for (int64_t r = 0; r < row.rows; ++r) {
      const int64_t i = row.first_row + r;
      int64_t lo = from_.has_number ? std::max<int64_t>(from_.number, 0) : 0;
      int64_t hi = to_.has_number ? std::min(to_.number, shape_.Sk) : shape_.Sk;
      if (from_.has_band) lo = std::max(lo, i + from_.band);
      if (to_.has_band) hi = std::min(hi, i + to_.band + 1);
      if (from) lo = std::max<int64_t>(lo, from[i * from_.row]);
      if (to) hi = std::min<int64_t>(hi, to[i * to_.row]);
      if (hi <= lo) lo = hi = 0;
      lo_[r] = lo, hi_[r] = hi;
      if (lo < hi) first = std::min(first, lo), last = std::max(last, hi);
      inner_first = std::max(inner_first, lo), inner_last = std::min(inner_last, hi);
    }
    uint8_t* status = status_.data();
    const int64_t n = shape_.n_k(), some = std::min(first / kSide, n), end = granules_of(last);
    std::fill(status, status + n, 0);
    if (some < end) std::fill(status + some, status + end, 1);
    const int64_t inner = granules_of(inner_first), stop = inner_last == shape_.Sk ? n : inner_last / kSide;
    if (inner < stop) std::fill(status + inner, status + stop, 2);
  }
  void fill(int64_t k, uint64_t* tile) override {
    const int64_t start = k * kSide;
    for (int64_t r = 0; r < row_.rows; ++r)
      tile[r] = first_bits(hi_[r] - start) & ~first_bits(lo_[r] - start);
    for (int64_t r = row_.rows; r < kSide; ++r) tile[r] = 0;
  }
  bool key(int64_t k, std::vector<uint64_t>* out) const override {
    if (band_only_) {
      out->push_back(uint64_t(row_.q - k));
    } else if (one_interval_) {
      const int64_t start = k * kSide;
      out->push_back(std::clamp<int64_t>(lo_[0] - start, 0, kSide) * (kSide + 1) +
                     std::clamp<int64_t>(hi_[0] - start, 0, kSide));
    } else {
      return false;
    }
    return true;
  }

 private:
  RangeBounds from_, to_;
  bool band_only_, one_interval_;
  GranuleRow row_;
  int64_t lo_[kSide], hi_[kSide];
};

// A set of keys for all rows: words int64 [.., .., n_k].
class KeySetNode : public MaskNode {
 public:
  // words: a plane's granules one after the other, planes as far apart as `batch` and `head` say.
  KeySetNode(const MaskShape& s, std::vector<uint64_t> words, int64_t batch, int64_t head)
      : MaskNode(s), words_(std::move(words)), planes_{words_.data(), batch, head} {}
  void begin(const GranuleRow& row) override {
    word_ = planes_.of(row);
    for (int64_t k = 0; k < shape_.n_k(); ++k) {
      const uint64_t complete = first_bits(key_end(k) - k * kSide);
      status_[k] = word_[k] == 0 ? 0 : word_[k] == complete ? 2 : 1;
    }
  }
  void fill(int64_t k, uint64_t* tile) override { std::fill(tile, tile + kSide, word_[k]); }
  bool key(int64_t k, std::vector<uint64_t>* out) const override {
    out->push_back(word_[k]);
    return true;
  }

 private:
  std::vector<uint64_t> words_;
  Planes<uint64_t> planes_;
  const uint64_t* word_ = nullptr;
};

// Keys at a distance from the row that `stride` divides.
class ModularNode : public MaskNode {
 public:
  ModularNode(const MaskShape& s, int64_t stride) : MaskNode(s), stride_(stride) {
    for (int64_t c = 0; c < kSide; c += stride) comb_ |= uint64_t(1) << c;
  }
  void begin(const GranuleRow& row) override {
    q_ = row.q;
    // A multiple within the distances D - 63 .. D + 63 of two granules D apart.
    int64_t rest = remainder(q_ * kSide + kSide - 1);
    const int64_t step = kSide % stride_;
    for (int64_t k = 0; k < shape_.n_k(); ++k) {
      status_[k] = stride_ == 1 ? 2 : rest <= 2 * (kSide - 1);
      rest -= step;
      if (rest < 0) rest += stride_;
    }
  }
  void fill(int64_t k, uint64_t* tile) override {
    int64_t c = remainder((q_ - k) * kSide);  // the first key of row 0 that counts
    for (int r = 0; r < kSide; ++r) {
      tile[r] = c < kSide ? comb_ << c : 0;
      if (++c == stride_) c = 0;
    }
  }
  bool key(int64_t k, std::vector<uint64_t>* out) const override {
    out->push_back(uint64_t(remainder((q_ - k) * kSide)));
    return true;
  }

 private:
  int64_t remainder(int64_t x) const { return (x % stride_ + stride_) % stride_; }

  int64_t stride_, q_ = 0;
  uint64_t comb_ = 0;
};

// Rows see the keys of their own id; ids int32 [.., Sq] and [.., Sk].
class SameIdNode : public MaskNode {
 public:
  SameIdNode(const MaskShape& s, Planes<int32_t> rows, Planes<int32_t> keys)
      : MaskNode(s), rows_(rows), keys_(keys), least_(s.n_k()), most_(s.n_k()) {}
  void begin(const GranuleRow& row) override {
    if (keys_.of(row) != key_) {
      key_ = keys_.of(row);
      for (int64_t k = 0; k < shape_.n_k(); ++k) {
        const auto [low, high] = std::minmax_element(key_ + k * kSide, key_ + key_end(k));
        least_[k] = *low, most_[k] = *high;
      }
    }
    row_ = row, id_ = rows_.of(row) + row.first_row;
    const auto [low, high] = std::minmax_element(id_, id_ + row.rows);
    for (int64_t k = 0; k < shape_.n_k(); ++k) {
      const bool some = *low <= most_[k] && least_[k] <= *high;
      status_[k] = some + (some && *low == *high && least_[k] == most_[k]);
    }
  }
  void fill(int64_t k, uint64_t* tile) override {
    const int32_t* key = key_ + k * kSide;
    const int64_t keys = key_end(k) - k * kSide;
    for (int64_t r = 0; r < row_.rows; ++r) {
      uint64_t word = 0;
      for (int64_t c = 0; c < keys; ++c) word |= uint64_t(key[c] == id_[r]) << c;
      tile[r] = word;
    }
    for (int64_t r = row_.rows; r < kSide; ++r) tile[r] = 0;
  }
  bool key(int64_t, std::vector<uint64_t>*) const override { return false; }

 private:
  Planes<int32_t> rows_, keys_;
  const int32_t *id_ = nullptr, *key_ = nullptr;
  GranuleRow row_;
  std::vector<int32_t> least_, most_;
};

// Row i sees key j where layout[i / block][j / block]: bytes [.., .., block rows, block columns].
class LayoutNode : public MaskNode {
 public:
  LayoutNode(const MaskShape& s, Planes<uint8_t> layout, int64_t columns, int64_t block)
      : MaskNode(s), layout_(layout), columns_(columns), block_(block), any_(columns), all_(columns) {}
  void begin(const GranuleRow& row) override {
    row_ = row, plane_ = layout_.of(row);
    const int64_t first = row.first_row / block_, last = (row.first_row + row.rows - 1) / block_;
    std::copy_n(plane_ + first * columns_, columns_, any_.begin());
    all_ = any_;
    for (int64_t n = first + 1; n <= last; ++n) {
      const uint8_t* blocks = plane_ + n * columns_;
      for (int64_t c = 0; c < columns_; ++c) any_[c] |= blocks[c], all_[c] &= blocks[c];
    }
    for (int64_t k = 0; k < shape_.n_k(); ++k) {
      uint8_t any = 0, all = 1;
      const int64_t end = (key_end(k) - 1) / block_;
      for (int64_t c = k * kSide / block_; c <= end; ++c) any |= any_[c], all &= all_[c];
      status_[k] = any + (any & all);
    }
  }
  void fill(int64_t k, uint64_t* tile) override {
    int64_t made = -1;
    for (int64_t r = 0; r < row_.rows; ++r) {
      const int64_t n = (row_.first_row + r) / block_;
      tile[r] = n == made ? tile[r - 1] : word(n, k);
      made = n;
    }
    for (int64_t r = row_.rows; r < kSide; ++r) tile[r] = 0;
  }
  bool key(int64_t k, std::vector<uint64_t>* out) const override {
    if (block_ < 8 || kSide % block_) return false;
    // The blocks themselves, up to 8 x 8.
    uint64_t bits = 0;
    for (int64_t r = 0; r < row_.rows; r += block_) {
      for (int64_t c = k * kSide; c < key_end(k); c += block_) {
        bits = bits << 1 | plane_[(row_.first_row + r) / block_ * columns_ + c / block_];
      }
    }
    out->push_back(bits);
    return true;
  }

 private:
  uint64_t word(int64_t n, int64_t k) const {
    uint64_t word = 0;
    const int64_t start = k * kSide, end = (key_end(k) - 1) / block_;
    for (int64_t c = start / block_; c <= end; ++c) {
      if (plane_[n * columns_ + c])
        word |= first_bits((c + 1) * block_ - start) & ~first_bits(c * block_ - start);
    }
    return word;
  }

  Planes<uint8_t> layout_;
  int64_t columns_, block_;
  std::vector<uint8_t> any_, all_;
  const uint8_t* plane_ = nullptr;
  GranuleRow row_;
};

// Each block of rows sees a few blocks of keys: int64 [.., .., block rows, picks].
class BlockListNode : public MaskNode {
 public:
  BlockListNode(const MaskShape& s, Planes<int64_t> picks, int64_t count, int64_t block)
      : MaskNode(s), picks_(picks), count_(count), block_(block) {}
  void begin(const GranuleRow& row) override {
    row_ = row, plane_ = picks_.of(row);
    std::fill(status_.begin(), status_.end(), 0);
    const uint8_t status = block_ % kSide == 0 ? 2 : 1;
    const int64_t first = row.first_row / block_, last = (row.first_row + row.rows - 1) / block_;
    for (int64_t n = first * count_; n < (last + 1) * count_; ++n) {
      const int64_t start = plane_[n] * block_, end = std::min(start + block_, shape_.Sk);
      if (start >= 0 && start < end)
        std::fill(&status_[start / kSide], &status_[(end - 1) / kSide] + 1, status);
    }
  }
  void fill(int64_t k, uint64_t* tile) override {
    int64_t made = -1;
    const int64_t start = k * kSide;
    for (int64_t r = 0; r < row_.rows; ++r) {
      const int64_t n = (row_.first_row + r) / block_;
      if (n == made) {
        tile[r] = tile[r - 1];
        continue;
      }
      made = n, tile[r] = 0;
      for (int64_t t = 0; t < count_; ++t) {
        const int64_t key = plane_[n * count_ + t] * block_ - start;
        tile[r] |= first_bits(key + block_) & ~first_bits(key);
      }
    }
    for (int64_t r = row_.rows; r < kSide; ++r) tile[r] = 0;
  }
  bool key(int64_t, std::vector<uint64_t>*) const override { return false; }

 private:
  Planes<int64_t> picks_;
  int64_t count_, block_;
  const int64_t* plane_ = nullptr;
  GranuleRow row_;
};

// Granules already known: codes int32 [.., .., n_q, n_k] into tiles int64 [T, 64].
class CodeNode : public MaskNode {
 public:
  CodeNode(const MaskShape& s, Planes<int32_t> codes, const uint64_t* tiles)
      : MaskNode(s), codes_(codes), tiles_(tiles) {}
  void begin(const GranuleRow& row) override {
    code_ = codes_.of(row) + row.q * shape_.n_k();
    for (int64_t k = 0; k < shape_.n_k(); ++k)
      status_[k] = code_[k] == kEmpty ? 0 : code_[k] == kFull ? 2 : 1;
  }
  void fill(int64_t k, uint64_t* tile) override {
    std::copy_n(tiles_ + code_[k] * int64_t(kSide), kSide, tile);
  }
  bool key(int64_t k, std::vector<uint64_t>* out) const override {
    out->push_back(uint64_t(code_[k]));
    return true;
  }

 private:
  Planes<int32_t> codes_;
  const uint64_t* tiles_;
  const int32_t* code_ = nullptr;
};

// Walks the granules of a tree. `within`, if given, is a range of the whole mask beside the tree: what it
// leaves empty is dropped, and its edges stay its own.
class MaskBuilder {
 public:
  MaskBuilder(const MaskShape& planes, NodePointer tree, NodePointer within)
      : shape_(planes), tree_(std::move(tree)), within_(std::move(within)), tiles_(kSide) {}

  // How many entries the list has at most.
  int64_t bound() {
    const int64_t all = shape_.B * shape_.H * shape_.n_q() * shape_.n_k();
    if (all <= kCountBeyond) return all;
    int64_t count = 0;
    each_row([&](const GranuleRow&) {
      for (int64_t k = 0; k < shape_.n_k(); ++k) count += shown(k) != 0;
    });
    return count;
  }

  // Writes offsets [B, H, n_q + 1] and blocks [N, 2], in order; returns N.
  int64_t run(int32_t* offsets, int32_t* blocks) {
    int64_t count = 0;
    each_row([&](const GranuleRow& row) {
      if (row.q == 0) *offsets++ = int32_t(count);
      for (int64_t k = 0; k < shape_.n_k(); ++k) {
        const uint8_t status = shown(k);
        if (status == 0) {
          everything_ &= within_ && within_->status()[k] == 0;
          continue;
        }
        const int32_t code = status == 2 ? kFull : code_of(row, k);
        everything_ &= code == kFull;
        if (code == kEmpty) continue;
        blocks[2 * count] = int32_t(k), blocks[2 * count + 1] = code;
        ++count;
      }
      *offsets++ = int32_t(count);
    });
    return count;
  }

  // Whether every granule that `within` leaves is full.
  bool everything() const { return everything_; }
  const WordSet& tiles() const { return tiles_; }

 private:
  static constexpr int64_t kCountBeyond = 1 << 16;
  static constexpr int64_t kKeysKept = 1 << 18;

  template <class Do>
  void each_row(const Do& work) {
    for (int64_t b = 0; b < shape_.B; ++b) {
      for (int64_t h = 0; h < shape_.H; ++h) {
        for (int64_t q = 0; q < shape_.n_q(); ++q) {
          const GranuleRow row = {b, h, q, q * kSide, std::min<int64_t>(kSide, shape_.Sq - q * kSide)};
          tree_->begin(row);
          if (within_) within_->begin(row);
          work(row);
        }
      }
    }
  }

  uint8_t shown(int64_t k) const { return within_ && within_->status()[k] == 0 ? 0 : tree_->status()[k]; }

  int32_t code_of(const GranuleRow& row, int64_t k) {
    const int64_t keys = std::min<int64_t>(kSide, shape_.Sk - k * kSide);
    key_.clear();
    key_.push_back(uint64_t(row.rows << 8 | keys));
    const bool keyed = tree_->key(k, &key_);
    int64_t known = -1;
    if (keyed) {
      // Keys of one length a set: leaves that are empty or full add less to them.
      const size_t length = key_.size();
      while (sets_.size() <= length) sets_.emplace_back(), codes_.emplace_back();
      if (!sets_[length]) sets_[length] = std::make_unique<WordSet>(int64_t(length));
      if (sets_[length]->size() < kKeysKept) {
        known = sets_[length]->add(key_.data());
        if (known < int64_t(codes_[length].size())) return codes_[length][known];
      }
    }
    uint64_t tile[kSide];
    tree_->fill(k, tile);
    int32_t code = clip(tile, row.rows, keys);
    if (code == 0) code = int32_t(tiles_.add(tile));
    if (known >= 0) codes_[key_.size()].push_back(code);
    return code;
  }

  MaskShape shape_;
  NodePointer tree_, within_;
  WordSet tiles_;
  bool everything_ = true;
  std::vector<uint64_t> key_;
  std::vector<std::unique_ptr<WordSet>> sets_;  // by the length of their keys
  std::vector<std::vector<int32_t>> codes_;     // by length, then by number
};

// The lists from keys to rows: a counting sort, stable, so that Q granules ascend.
inline void transpose_blocks(const int32_t* offsets, const int32_t* blocks, int64_t planes, int64_t n_q,
                             int64_t n_k, int32_t* offsets_t, int32_t* blocks_t) {
  std::vector<int32_t> next(n_k);
  for (int64_t p = 0; p < planes; ++p) {
    const int32_t* row = offsets + p * (n_q + 1);
    std::fill(next.begin(), next.end(), 0);
    for (int64_t n = row[0]; n < row[n_q]; ++n) ++next[blocks[2 * n]];
    int32_t total = row[0];
    for (int64_t k = 0; k < n_k; ++k) {
      offsets_t[p * (n_k + 1) + k] = total;
      total += next[k];
      next[k] = offsets_t[p * (n_k + 1) + k];
    }
    offsets_t[p * (n_k + 1) + n_k] = total;
    for (int64_t q = 0; q < n_q; ++q) {
      for (int64_t n = row[q]; n < row[q + 1]; ++n) {
        const int64_t to = next[blocks[2 * n]]++;
        blocks_t[2 * to] = int32_t(q), blocks_t[2 * to + 1] = blocks[2 * n + 1];
      }
    }
  }
}

}  // namespace fastattn
