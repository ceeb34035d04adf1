// Twin of csrc/cuda/ptx/ldmatrix.h.
#pragma once

#include "launch.h"

namespace twin {

// Of ldmatrix: a card serves eight rows of 16 bytes at once where they lie in different banks.
inline int bank_conflicts = 0;

// Each lane reads the row it points at, then takes its elements from the other lanes' rows.
struct MatrixRow {
  uint16_t element[8];
  uint32_t address;
};
inline const MatrixRow* exchange_rows(const char* what, const void* row) {
  MatrixRow mine;
  mine.address = block->smem.address(row, 16, 16);
  std::memcpy(mine.element, row, sizeof(mine.element));
  return warp_collective(what, kAllLanes, mine, [](MatrixRow* rows) {
    for (int matrix = 0; matrix < kWarpSize; matrix += 8) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << rows[matrix + i].address / 16 % 8;
      bank_conflicts += banks != 0xff;
    }
  });
}

}  // namespace twin

namespace fastattn::cuda {

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], const T* row) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  const twin::MatrixRow* rows = twin::exchange_rows("ldmatrix_x4", row);
  const int i = twin::self->lane() / 4, j = twin::self->lane() % 4 * 2;
  for (int t = 0; t < 4; ++t) {
    r[t] = rows[t * 8 + i].element[j] | uint32_t(rows[t * 8 + i].element[j + 1]) << 16;
  }
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], const T* row) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  const twin::MatrixRow* rows = twin::exchange_rows("ldmatrix_x4_trans", row);
  const int i = twin::self->lane() / 4, j = twin::self->lane() % 4 * 2;
  for (int t = 0; t < 4; ++t) {
    r[t] = rows[t * 8 + j].element[i] | uint32_t(rows[t * 8 + j + 1].element[i]) << 16;
  }
}

}  // namespace fastattn::cuda
