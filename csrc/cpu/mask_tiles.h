// 64 x 64 bit tiles of a mask, each kept once, and the codes of granules.
//
// A tile is 64 words, one a row; bit c of word r says whether row r of the granule sees its key c. Compiled
// in the baseline instruction set only: it uses the standard library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastattn {

constexpr int kSide = 64;                   // rows and keys of a granule
constexpr int32_t kFull = -1, kEmpty = -2;  // codes of a granule; others are indices of tiles
constexpr uint64_t kAllKeys = ~uint64_t(0);

inline int64_t granules_of(int64_t size) { return (size + kSide - 1) / kSide; }

// The n lowest bits, n clamped to 0..64.
inline uint64_t first_bits(int64_t n) { return n <= 0 ? 0 : n >= kSide ? kAllKeys : (uint64_t(1) << n) - 1; }

inline uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ull;
  return x ^ (x >> 29);
}

// Sums products of the words' halves, each shifted by a constant of its place: one multiplication a word, and
// none waits for another.
inline uint64_t hash_words(const uint64_t* words, int64_t count) {
  uint64_t sum = uint64_t(count);
  uint64_t place = 0x9e3779b97f4a7c15ull;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t shifted = words[i] + place;
    sum += (shifted & 0xffffffff) * (shifted >> 32);
    place += 0xd1b54a32d192ed03ull;
  }
  return mix(sum);
}

// Keys of words, all of one length, numbered in the order they came in. Open addressing, at most half full;
// the words themselves stay where the caller has them.
class WordIndex {
 public:
  // `expected` keys go in without growing.
  explicit WordIndex(int64_t length, int64_t expected = 32) : length_(length) {
    size_t slots = 64;
    while (int64_t(slots) < 2 * expected) slots *= 2;
    slots_.assign(slots, Slot{0, -1});
    keys_.reserve(expected);
  }

  int64_t size() const { return int64_t(keys_.size()); }
  const uint64_t* at(int64_t n) const { return keys_[n]; }
  // Key n has been copied and stands elsewhere from now on.
  void move(int64_t n, const uint64_t* to) { keys_[n] = to; }

  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]); }

  // The number of a key; a new one is added and gets the number size().
  int64_t add(const uint64_t* key, uint64_t hash) {
    if (2 * keys_.size() >= slots_.size()) grow();
    Slot* slot = find(hash, [&](const Slot& s) {
      return s.hash == hash && memcmp(keys_[s.number], key, length_ * sizeof(uint64_t)) == 0;
    });
    if (slot->number < 0) {
      *slot = {hash, size()};
      keys_.push_back(key);
    }
    return slot->number;
  }

 private:
  struct Slot {
    uint64_t hash;
    int64_t number;
  };

  // The slot that is `same`, or the first free one.
  template <class Same>
  Slot* find(uint64_t hash, const Same& same) {
    size_t n = hash & (slots_.size() - 1);
    while (slots_[n].number >= 0 && !same(slots_[n])) n = (n + 1) & (slots_.size() - 1);
    return &slots_[n];
  }
  void grow() {
    std::vector<Slot> old(2 * slots_.size(), Slot{0, -1});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.number >= 0) *find(slot.hash, [](const Slot&) { return false; }) = slot;
    }
  }

  int64_t length_;
  std::vector<Slot> slots_;
  std::vector<const uint64_t*> keys_;
};

// A WordIndex that keeps copies of its words, in segments that never move.
class WordSet {
 public:
  explicit WordSet(int64_t length) : length_(length), index_(length) {}

  int64_t size() const { return index_.size(); }
  const uint64_t* at(int64_t n) const { return index_.at(n); }

  int64_t add(const uint64_t* key) {
    const int64_t before = size(), n = index_.add(key, hash_words(key, length_));
    if (n == before) {
      if (n % kSegment == 0) segments_.emplace_back(kSegment * length_);
      uint64_t* copy = segments_.back().data() + n % kSegment * length_;
      std::copy_n(key, length_, copy);
      index_.move(n, copy);
    }
    return n;
  }

 private:
  static constexpr int64_t kSegment = 64;

  int64_t length_;
  WordIndex index_;
  std::vector<std::vector<uint64_t>> segments_;
};

// A tile without the bits beyond `rows` and `keys`, and its status: kEmpty, kFull, or 0 for neither.
inline int32_t clip(uint64_t* tile, int64_t rows, int64_t keys) {
  const uint64_t complete = first_bits(keys);
  uint64_t any = 0, all = kAllKeys;
  for (int64_t r = 0; r < rows; ++r) {
    tile[r] &= complete;
    any |= tile[r];
    all &= tile[r];
  }
  for (int64_t r = rows; r < kSide; ++r) tile[r] = 0;
  return any == 0 ? kEmpty : all == complete ? kFull : 0;
}

}  // namespace fastattn
