// CPU bindings of the mask ops: a plain tensor or a tree of the algebra becomes block lists and bit tiles.
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "bind.h"
#include "cpu/mask_build.h"
#include "cpu/targets/targets.h"
#include "parallel.h"
#include "results.h"

namespace fastattn {
namespace {

using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What the last result of mask_scan, mask_build and mask_keys says beside the lists.
constexpr int64_t kEverything = 1;  // every granule is full: the bits hide nothing
constexpr int64_t kNonzero = 2;     // an additive tensor holds something visible other than 0
constexpr int64_t kGaps = 4;        // some plane's keys are not one interval
constexpr int64_t kFromStart = 8;   // every plane's interval begins with the first key
constexpr int64_t kToEnd = 16;      // every plane's interval ends with the last key

Tensor new_ints(std::vector<int64_t> sizes, ScalarType dtype = ScalarType::Int) {
  return new_tensor(sizes, dtype);
}

// Tiles of 64 words, appended; the memory is not cleared first.
class TileBuffer {
 public:
  TileBuffer() = default;
  TileBuffer(const TileBuffer&) = delete;
  ~TileBuffer() { std::free(data_); }
  int32_t size() const { return size_; }
  uint64_t* at(int64_t n) { return data_ + n * kSide; }
  // Space for `count` more; what is appended up to there does not move what came before.
  void reserve(int64_t count) {
    if (size_ + count <= room_) return;
    room_ = std::max(size_ + count, 2 * room_);
    data_ = static_cast<uint64_t*>(std::realloc(data_, room_ * kSide * sizeof(uint64_t)));
    STD_TORCH_CHECK(data_ != nullptr, "fastattn: out of memory for the tiles of a mask");
  }
  uint64_t* append() { return at(size_++); }

 private:
  uint64_t* data_ = nullptr;
  int32_t size_ = 0;
  int64_t room_ = 0;
};

// A tensor, because torch.compile takes an int that an op returns for a constant.
Tensor flags_tensor(int64_t flags) {
  Tensor t = new_ints({}, ScalarType::Long);
  *static_cast<int64_t*>(t.mutable_data_ptr()) = flags;
  return t;
}

// One granule of rows of a scanned tensor.
struct ScannedRow {
  std::vector<int32_t> codes;  // a granule of keys; what is partial counts up from 0
  TileBuffer tiles;            // of the partial granules
  std::vector<uint64_t> hashes;
  bool nonzero = false;
};

void scan_row(MaskScan scan, const MaskScanArgs& a, int64_t q, ScannedRow* row) {
  // Eight tiles are filled together: their words lie side by side in a row.
  constexpr int64_t kColumns = 8;
  ScannedWords seen;
  uint64_t unused[kSide];
  const int64_t rows = std::min<int64_t>(kSide, a.Sq - q * kSide), n_k = granules_of(a.Sk);
  row->codes.resize(n_k);
  for (int64_t k = 0; k < n_k; k += kScanGranules) {
    const int64_t count = std::min<int64_t>(kScanGranules, n_k - k);
    scan(a, q * kSide, rows, k * kSide, count, &seen);
    row->nonzero |= seen.nonzero;
    for (int64_t g = 0; g < count; g += kColumns) {
      const int64_t columns = std::min(kColumns, count - g);
      int32_t partial = 0;
      for (int64_t c = 0; c < columns; ++c) {
        int32_t code = kFull;
        if (seen.any[g + c] == 0) {
          code = kEmpty;
        } else if (seen.all[g + c] != first_bits(a.Sk - (k + g + c) * kSide)) {
          code = row->tiles.size() + partial++;
        }
        row->codes[k + g + c] = code;
      }
      if (partial == 0) continue;
      row->tiles.reserve(partial);
      uint64_t* tiles[kColumns];
      for (int64_t c = 0; c < kColumns; ++c) {
        tiles[c] = c < columns && row->codes[k + g + c] >= 0 ? row->tiles.append() : unused;
      }
      for (int64_t r = 0; r < kSide; ++r) {
        for (int64_t c = 0; c < kColumns; ++c) tiles[c][r] = r < rows ? seen.word[r][g + c] : 0;
      }
    }
  }
  row->hashes.resize(row->tiles.size());
  for (int32_t n = 0; n < row->tiles.size(); ++n) row->hashes[n] = hash_words(row->tiles.at(n), kSide);
}

// Whether the first key of some granule is hidden from the first row: where none is, no granule is hidden
// whole.
bool some_corner_hidden(const MaskScanArgs& a, int64_t q) {
  const char* row = static_cast<const char*>(a.data) + q * kSide * a.row * int64_t(a.bytes);
  for (int64_t k = 0; k < a.Sk; k += kSide) {
    uint64_t entry = 0;
    std::memcpy(&entry, row + k * a.key * int64_t(a.bytes), a.bytes);
    if (entry == a.hidden) return true;
  }
  return false;
}

MaskScanArgs scan_args(const Tensor& mask) {
  MaskScanArgs a{};
  STD_TORCH_CHECK(mask.dim() == 4 && mask.numel() > 0,
                  "fastattn: mask_scan needs a mask of 4 dimensions, none 0");
  switch (mask.scalar_type()) {
    case ScalarType::Bool: a.bytes = 1; break;
    case ScalarType::Half: a.bytes = 2, a.hidden = 0xfc00; break;
    case ScalarType::BFloat16: a.bytes = 2, a.hidden = 0xff80; break;
    case ScalarType::Float: a.bytes = 4, a.hidden = 0xff800000; break;
    case ScalarType::Double: a.bytes = 8, a.hidden = 0xfff0000000000000; break;
    default: STD_TORCH_CHECK(false, "fastattn: mask_scan needs a bool or floating mask");
  }
  a.Sq = mask.size(2), a.Sk = mask.size(3), a.row = mask.stride(2), a.key = mask.stride(3);
  return a;
}

// The plane of one batch and head.
MaskScanArgs plane_args(const Tensor& mask, int64_t b, int64_t h) {
  MaskScanArgs a = scan_args(mask);
  a.data = static_cast<const char*>(mask.const_data_ptr()) +
           (b * mask.stride(0) + h * mask.stride(1)) * int64_t(a.bytes);
  return a;
}

// Rows of granules that `looked_at(plane, row)` refuses count as full.
template <class LookedAt>
Lists scan_lists(const Tensor& mask, LookedAt looked_at) {
  const MaskScanArgs args = scan_args(mask);
  const MaskScan scan = kernels().mask_scan;
  const int64_t B = mask.size(0), H = mask.size(1), n_q = granules_of(args.Sq), n_k = granules_of(args.Sk);
  std::vector<ScannedRow> rows(B * H * n_q);
  run_tasks(int64_t(rows.size()), 0, [&](int64_t i, void*) {
    const MaskScanArgs a = plane_args(mask, i / n_q / H, i / n_q % H);
    if (looked_at(a, i % n_q)) {
      scan_row(scan, a, i % n_q, &rows[i]);
    } else {
      rows[i].codes.assign(n_k, kFull);
    }
  });

  // Numbers the tiles in the order of the granules, whatever thread found them.
  int64_t partial = 0;
  for (const ScannedRow& row : rows) partial += int64_t(row.hashes.size());
  WordIndex unique(kSide, partial);
  Tensor offsets = new_ints({B, H, n_q + 1});
  int32_t* offset = static_cast<int32_t*>(offsets.mutable_data_ptr());
  std::vector<int64_t> starts(rows.size());
  std::vector<int32_t> numbers;
  int64_t count = 0, flags = kEverything;
  for (size_t i = 0; i < rows.size(); ++i) {
    ScannedRow& row = rows[i];
    numbers.resize(row.hashes.size());
    for (uint64_t hash : row.hashes) unique.prefetch(hash);
    for (size_t n = 0; n < numbers.size(); ++n)
      numbers[n] = int32_t(unique.add(row.tiles.at(n), row.hashes[n]));
    if (i % n_q == 0) *offset++ = int32_t(count);
    starts[i] = count;
    for (int32_t& code : row.codes) {
      if (code >= 0) code = numbers[code];
      count += code != kEmpty;
      if (code != kFull) flags &= ~kEverything;
    }
    if (row.nonzero) flags |= kNonzero;
    *offset++ = int32_t(count);
  }

  Tensor blocks = new_ints({count, 2}), tiles = new_ints({unique.size(), kSide}, ScalarType::Long);
  int32_t* block = static_cast<int32_t*>(blocks.mutable_data_ptr());
  uint64_t* tile = static_cast<uint64_t*>(tiles.mutable_data_ptr());
  const int64_t copies = granules_of(unique.size());
  run_tasks(int64_t(rows.size()) + copies, 0, [&](int64_t i, void*) {
    if (i < copies) {
      for (int64_t n = i * kSide; n < std::min(unique.size(), (i + 1) * kSide); ++n) {
        std::copy_n(unique.at(n), kSide, tile + n * kSide);
      }
      return;
    }
    int32_t* to = block + 2 * starts[i - copies];
    for (int64_t k = 0; k < n_k; ++k) {
      const int32_t code = rows[i - copies].codes[k];
      if (code != kEmpty) *to++ = int32_t(k), *to++ = code;
    }
  });
  return {offsets, blocks, tiles, flags_tensor(flags)};
}

Lists mask_scan(const Tensor& mask) {
  return scan_lists(mask, [](const MaskScanArgs&, int64_t) { return true; });
}

Lists full_lists(int64_t planes_b, int64_t planes_h, int64_t n_q, int64_t n_k) {
  const int64_t rows = planes_b * planes_h * n_q;
  Tensor offsets = new_ints({planes_b, planes_h, n_q + 1}), blocks = new_ints({rows * n_k, 2});
  int32_t *offset = static_cast<int32_t*>(offsets.mutable_data_ptr()),
          *block = static_cast<int32_t*>(blocks.mutable_data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    if (i % n_q == 0) *offset++ = int32_t(i * n_k);
    *offset++ = int32_t((i + 1) * n_k);
    for (int64_t k = 0; k < n_k; ++k) *block++ = int32_t(k), *block++ = kFull;
  }
  return {offsets, blocks, new_ints({0, kSide}, ScalarType::Long), flags_tensor(kEverything)};
}

// A bias hides its -inf itself wherever a kernel reads it: the lists only say what need not be read. Mostly
// that is nothing, and then known by one entry of 4096. Rows of granules without a hidden corner count as
// full, whatever -inf lies inside their granules. Of the flags only kEverything holds.
Lists bias_scan(const Tensor& bias) {
  STD_TORCH_CHECK(bias.scalar_type() != ScalarType::Bool, "fastattn: bias_scan needs a floating bias");
  const MaskScanArgs args = scan_args(bias);
  const int64_t B = bias.size(0), H = bias.size(1), n_q = granules_of(args.Sq);
  bool hidden = false;
  for (int64_t i = 0; i < B * H * n_q && !hidden; ++i) {
    hidden = some_corner_hidden(plane_args(bias, i / n_q / H, i / n_q % H), i % n_q);
  }
  if (!hidden) return full_lists(B, H, n_q, granules_of(args.Sk));
  return scan_lists(bias, some_corner_hidden);
}

// The keys of one plane joined to an interval, granule by granule.
struct KeyInterval {
  int64_t first = -1, end = 0;
  bool gaps = false;

  void add(uint64_t seen, int64_t at) {
    if (seen == 0) return;
    const int64_t from = at + __builtin_ctzll(seen), to = at + kSide - __builtin_clzll(seen);
    gaps |= to - from != __builtin_popcountll(seen) || (first >= 0 && from != end);
    if (first < 0) first = from;
    end = to;
  }
};

// A mask that differs along keys alone, as padding does: the commonest of all, and in short calls what finds
// it must cost less than what it saves.
std::tuple<Tensor, Tensor, Tensor> mask_keys(const Tensor& mask) {
  MaskScanArgs a = scan_args(mask);
  STD_TORCH_CHECK(a.Sq == 1, "fastattn: mask_keys needs a mask with one row, got ", a.Sq);
  const MaskScan scan = kernels().mask_scan;
  const int64_t B = mask.size(0), H = mask.size(1), n_k = granules_of(a.Sk);
  Tensor lo = new_ints({B, H, 1}), hi = new_ints({B, H, 1});
  int32_t *los = static_cast<int32_t*>(lo.mutable_data_ptr()),
          *his = static_cast<int32_t*>(hi.mutable_data_ptr());
  int64_t flags = kFromStart | kToEnd;
  ScannedWords seen;
  for (int64_t plane = 0; plane < B * H; ++plane) {
    a = plane_args(mask, plane / H, plane % H);
    KeyInterval keys;
    for (int64_t k = 0; k < n_k; k += kScanGranules) {
      const int64_t count = std::min<int64_t>(kScanGranules, n_k - k);
      scan(a, 0, 1, k * kSide, count, &seen);
      if (seen.nonzero) flags |= kNonzero;
      for (int64_t g = 0; g < count; ++g) keys.add(seen.word[0][g], (k + g) * kSide);
    }
    if (keys.gaps) flags |= kGaps;
    if (keys.first != 0) flags &= ~kFromStart;
    if (keys.end != a.Sk) flags &= ~kToEnd;
    los[plane] = int32_t(std::max<int64_t>(keys.first, 0)), his[plane] = int32_t(keys.end);
  }
  return {lo, hi, flags_tensor(flags)};
}

// The words of a contiguous bool tensor [B, H, Sk], plane after plane.
std::vector<uint64_t> key_words(const Tensor& keys) {
  const MaskScan scan = kernels().mask_scan;
  const int64_t planes = keys.size(0) * keys.size(1), n_k = granules_of(keys.size(2));
  MaskScanArgs a{};
  a.Sq = 1, a.Sk = keys.size(2), a.row = a.Sk, a.key = 1, a.bytes = 1;
  std::vector<uint64_t> words(planes * n_k);
  ScannedWords seen;
  for (int64_t plane = 0; plane < planes; ++plane) {
    a.data = static_cast<const char*>(keys.const_data_ptr()) + plane * a.Sk;
    for (int64_t k = 0; k < n_k; k += kScanGranules) {
      const int64_t count = std::min<int64_t>(kScanGranules, n_k - k);
      scan(a, 0, 1, k * kSide, count, &seen);
      std::copy_n(seen.word[0], count, &words[plane * n_k + k]);
    }
  }
  return words;
}

// Reads a tree in postfix order; the numbers are written by fastattn/masks/native.py.
class TreeReader {
 public:
  TreeReader(const std::vector<int64_t>& program, const std::vector<Tensor>& tensors, const MaskShape& shape)
      : program_(program), tensors_(tensors), shape_(shape) {}

  // The tree, and the range that prunes it, if there is one.
  std::pair<NodePointer, NodePointer> read(int64_t B, int64_t H) {
    B_ = B, H_ = H;
    NodePointer within;
    while (at_ < program_.size()) {
      const int64_t kind = next();
      if (kind == kWithin) {
        within = pop();
      } else {
        stack_.push_back(node(kind));
      }
    }
    STD_TORCH_CHECK(stack_.size() == 1, "fastattn: mask_build needs one tree");
    return {pop(), std::move(within)};
  }

 private:
  enum Kind : int64_t {
    kAnd,
    kOr,
    kNot,
    kRange,
    kKeySet,
    kModular,
    kSameId,
    kLayout,
    kBlockList,
    kCodes,
    kWithin
  };

  int64_t next() {
    STD_TORCH_CHECK(at_ < program_.size(), "fastattn: the program of mask_build ends early");
    return program_[at_++];
  }
  NodePointer pop() {
    STD_TORCH_CHECK(!stack_.empty(), "fastattn: the program of mask_build takes a node that is not there");
    NodePointer top = std::move(stack_.back());
    stack_.pop_back();
    return top;
  }

  // A contiguous tensor [B or 1, H or 1, ...] of `rest` further dimensions.
  const Tensor& tensor(int64_t n, ScalarType dtype, std::vector<int64_t> rest) {
    STD_TORCH_CHECK(n >= 0 && n < int64_t(tensors_.size()), "fastattn: mask_build has no tensor ", n);
    const Tensor& t = tensors_[n];
    bool fits = t.scalar_type() == dtype && t.is_contiguous() && t.dim() == int64_t(rest.size()) + 2;
    for (size_t d = 0; fits && d < rest.size(); ++d) fits = rest[d] < 0 || t.size(d + 2) == rest[d];
    STD_TORCH_CHECK(fits, "fastattn: tensor ", n,
                    " of mask_build has another dtype or shape than its node takes");
    return t;
  }
  template <class T>
  Planes<T> planes(const Tensor& t) {
    return {static_cast<const T*>(t.const_data_ptr()), broadcast_stride(t, 0, B_, "a mask's tensor"),
            broadcast_stride(t, 1, H_, "a mask's tensor")};
  }

  RangeBounds bounds() {
    RangeBounds b;
    b.has_band = next(), b.band = next(), b.has_number = next(), b.number = next();
    if (const int64_t n = next(); n >= 0) {
      const Tensor& t = tensor(n, ScalarType::Int, {-1});
      STD_TORCH_CHECK(t.size(2) == 1 || t.size(2) == shape_.Sq, "fastattn: a bound needs 1 or Sq rows");
      b.tensor = planes<int32_t>(t), b.row = t.size(2) == 1 ? 0 : 1;
    }
    return b;
  }

  NodePointer node(int64_t kind) {
    const MaskShape& s = shape_;
    const int64_t n_q = s.n_q(), n_k = s.n_k();
    switch (kind) {
      case kAnd:
      case kOr: {
        std::vector<NodePointer> children(next());
        for (auto child = children.rbegin(); child != children.rend(); ++child) *child = pop();
        return std::make_unique<JoinNode>(s, kind == kAnd, std::move(children));
      }
      case kNot: return std::make_unique<NotNode>(s, pop());
      case kRange: {
        const RangeBounds lo = bounds(), hi = bounds();
        return std::make_unique<RangeNode>(s, lo, hi);
      }
      case kKeySet: {
        const Tensor& keys = tensor(next(), ScalarType::Bool, {s.Sk});
        const Planes<uint8_t> plane = planes<uint8_t>(keys);
        return std::make_unique<KeySetNode>(s, key_words(keys), plane.batch / s.Sk * n_k,
                                            plane.head / s.Sk * n_k);
      }
      case kModular: {
        const int64_t stride = next();
        STD_TORCH_CHECK(stride > 0, "fastattn: a stride must be positive");
        return std::make_unique<ModularNode>(s, stride);
      }
      case kSameId: {
        const Tensor& rows = tensor(next(), ScalarType::Int, {n_q, kSide});
        const Tensor& keys = tensor(next(), ScalarType::Int, {n_k, kSide});
        return std::make_unique<SameIdNode>(s, planes<int32_t>(rows), planes<int32_t>(keys));
      }
      case kLayout: {
        const Tensor& layout = tensor(next(), ScalarType::Bool, {-1, -1});
        const int64_t block = checked_block(layout.size(2));
        STD_TORCH_CHECK(layout.size(3) * block >= s.Sk, "fastattn: a layout ends before the keys");
        return std::make_unique<LayoutNode>(s, planes<uint8_t>(layout), layout.size(3), block);
      }
      case kBlockList: {
        const Tensor& picks = tensor(next(), ScalarType::Long, {-1, -1});
        const int64_t block = checked_block(picks.size(2));
        return std::make_unique<BlockListNode>(s, planes<int64_t>(picks), picks.size(3), block);
      }
      case kCodes: {
        const Tensor& codes = tensor(next(), ScalarType::Int, {n_q, n_k});
        const Tensor& tiles = tensor(next(), ScalarType::Long, {});
        const int32_t* code = static_cast<const int32_t*>(codes.const_data_ptr());
        STD_TORCH_CHECK(tiles.size(1) == kSide &&
                            std::all_of(code, code + codes.numel(),
                                        [&](int32_t c) { return c >= kEmpty && c < tiles.size(0); }),
                        "fastattn: a code names a tile that is not there");
        return std::make_unique<CodeNode>(s, planes<int32_t>(codes),
                                          static_cast<const uint64_t*>(tiles.const_data_ptr()));
      }
      default: STD_TORCH_CHECK(false, "fastattn: mask_build has no node ", kind);
    }
  }
  int64_t checked_block(int64_t rows) {
    const int64_t block = next();
    STD_TORCH_CHECK(block > 0 && rows * block >= shape_.Sq, "fastattn: blocks end before the rows");
    return block;
  }

  const std::vector<int64_t>& program_;
  const std::vector<Tensor>& tensors_;
  MaskShape shape_;
  int64_t B_ = 1, H_ = 1;
  size_t at_ = 0;
  std::vector<NodePointer> stack_;
};

Lists mask_build(std::vector<int64_t> program, std::vector<Tensor> tensors, int64_t B, int64_t H, int64_t Sq,
                 int64_t Sk) {
  STD_TORCH_CHECK(B > 0 && H > 0 && Sq > 0 && Sk > 0, "fastattn: mask_build needs a shape without zeros");
  const MaskShape shape = {B, H, Sq, Sk};
  auto [tree, within] = TreeReader(program, tensors, shape).read(B, H);
  MaskBuilder builder(shape, std::move(tree), std::move(within));
  const int64_t bound = builder.bound();
  STD_TORCH_CHECK(bound < (int64_t(1) << 31), "fastattn: a mask of ", bound,
                  " blocks is too large for int32");
  Tensor offsets = new_ints({B, H, shape.n_q() + 1}), blocks = new_ints({bound, 2});
  const int64_t count = builder.run(static_cast<int32_t*>(offsets.mutable_data_ptr()),
                                    static_cast<int32_t*>(blocks.mutable_data_ptr()));
  Tensor tiles = new_ints({builder.tiles().size(), kSide}, ScalarType::Long);
  uint64_t* tile = static_cast<uint64_t*>(tiles.mutable_data_ptr());
  for (int64_t n = 0; n < builder.tiles().size(); ++n)
    std::copy_n(builder.tiles().at(n), kSide, tile + n * kSide);
  if (count < bound) blocks = torch::stable::narrow(blocks, 0, 0, count);
  return {offsets, blocks, tiles, flags_tensor(builder.everything() ? kEverything : 0)};
}

std::tuple<Tensor, Tensor> mask_transpose(const Tensor& offsets, const Tensor& blocks, int64_t n_k) {
  check_dtype(offsets, ScalarType::Int, "block_offsets", "int32");
  check_dtype(blocks, ScalarType::Int, "block_list", "int32");
  STD_TORCH_CHECK(offsets.dim() == 3 && offsets.is_contiguous() && blocks.dim() == 2 && blocks.size(1) == 2 &&
                      blocks.is_contiguous(),
                  "fastattn: block_offsets must be [B, H, n_q + 1] and block_list [N, 2], contiguous");
  const int64_t B = offsets.size(0), H = offsets.size(1), n_q = offsets.size(2) - 1;
  Tensor offsets_t = new_ints({B, H, n_k + 1}), blocks_t = new_ints({blocks.size(0), 2});
  transpose_blocks(static_cast<const int32_t*>(offsets.const_data_ptr()),
                   static_cast<const int32_t*>(blocks.const_data_ptr()), B * H, n_q, n_k,
                   static_cast<int32_t*>(offsets_t.mutable_data_ptr()),
                   static_cast<int32_t*>(blocks_t.mutable_data_ptr()));
  return {offsets_t, blocks_t};
}

// What rows first..last - 1 see: bool [B, H, last - first, Sk].
Tensor mask_rows(const Tensor& offsets, const Tensor& blocks, const Tensor& tiles, int64_t first,
                 int64_t last, int64_t Sk) {
  check_dtype(offsets, ScalarType::Int, "block_offsets", "int32");
  check_dtype(blocks, ScalarType::Int, "block_list", "int32");
  check_dtype(tiles, ScalarType::Long, "bit_tiles", "int64");
  STD_TORCH_CHECK(offsets.dim() == 3 && offsets.is_contiguous() && blocks.dim() == 2 && blocks.size(1) == 2 &&
                      blocks.is_contiguous() && tiles.dim() == 2 && tiles.size(1) == kSide &&
                      tiles.is_contiguous(),
                  "fastattn: block_offsets must be [B, H, n_q + 1], block_list [N, 2] and bit_tiles [T, 64], "
                  "contiguous");
  const int64_t B = offsets.size(0), H = offsets.size(1), n_q = offsets.size(2) - 1;
  STD_TORCH_CHECK(0 <= first && first <= last && last <= n_q * kSide, "fastattn: mask_rows has no rows ",
                  first, "..", last);
  Tensor seen = new_ints({B, H, last - first, Sk}, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(seen.mutable_data_ptr());
  std::fill_n(to, B * H * (last - first) * Sk, uint8_t(0));
  const int32_t* offset = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int32_t* block = static_cast<const int32_t*>(blocks.const_data_ptr());
  const uint64_t* tile = static_cast<const uint64_t*>(tiles.const_data_ptr());
  const int64_t q0 = first / kSide, granule_rows = granules_of(last) - q0;
  run_tasks(last == first ? 0 : B * H * granule_rows, 0, [&](int64_t i, void*) {
    const int64_t plane = i / granule_rows, q = q0 + i % granule_rows;
    const int32_t* bounds = offset + plane * (n_q + 1) + q;
    for (int64_t row = std::max(first, q * kSide); row < std::min(last, (q + 1) * kSide); ++row) {
      uint8_t* keys = to + (plane * (last - first) + row - first) * Sk;
      for (int64_t n = bounds[0]; n < bounds[1]; ++n) {
        const int64_t k = block[2 * n], code = block[2 * n + 1];
        const uint64_t word = code < 0 ? kAllKeys : tile[code * kSide + row - q * kSide];
        const int64_t end = std::min<int64_t>(kSide, Sk - k * kSide);
        for (int64_t c = 0; c < end; ++c) keys[k * kSide + c] = word >> c & 1;
      }
    }
  });
  return seen;
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("mask_scan", TORCH_BOX(&fastattn::mask_scan));
  m.impl("bias_scan", TORCH_BOX(&fastattn::bias_scan));
  m.impl("mask_keys", TORCH_BOX(&fastattn::mask_keys));
  m.impl("mask_transpose", TORCH_BOX(&fastattn::mask_transpose));
  m.impl("mask_rows", TORCH_BOX(&fastattn::mask_rows));
}

// A tree may have no tensor to dispatch by.
STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("mask_build", TORCH_BOX(&fastattn::mask_build));
}
