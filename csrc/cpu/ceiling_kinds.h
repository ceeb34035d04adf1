// The loops of ceilings.h by number, for the kernel tables and the op that times them.
#pragma once

#include <stdint.h>

namespace fastattn {

enum class Ceiling : int {
  kFmaF32 = 0,     // fp32 multiply-adds from registers
  kDotBf16 = 1,    // bf16 pair products added in fp32, from registers
  kTileBf16 = 2,   // bf16 tile products, tiles loaded from L1
  kRead = 3,       // bytes read
  kCopy = 4,       // bytes read plus bytes written
  kCopyStream = 5  // the same with stores that go past the caches
};

// Bytes of source that the arithmetic loops read; memory loops move blocks of kCeilingBlock bytes.
constexpr int64_t kCeilingData = 16384;
constexpr int64_t kCeilingBlock = 1024;

// Runs one loop and returns what it did: floating-point operations, or bytes. 0 means that this instruction
// set cannot do it. source holds max(bytes, kCeilingData) bytes of random numbers, destination as many, both
// aligned to 64; bytes counts for the memory loops only. kRead alone takes any address, and writes
// kCeilingBlock bytes at most.
using CeilingLoop = double (*)(int kind, int64_t rounds, const void* source, void* destination,
                               int64_t bytes);

}  // namespace fastattn
