// Starts attention_sm90: which calls it serves, their tensor maps and their order of tiles. For the binding
// and the tests; include it where the kernel is instantiated.
#pragma once

#include "attention_sm90.cuh"

namespace fastattn::cuda {

// Why attention_sm90 does not serve a call, which then goes to sm_80's kernel; null: it does. Shapes are
// consistent and the architecture is 9.0.
inline const char* attention_sm90_refusal(const AttentionArgs& args) {
  if (args.D != args.Dv) return "D and Dv differ";
  if (args.D != 64 && args.D != 128 && args.D != 256) return "D is not 64, 128 or 256";
  if (args.bias) return "it has no bias";
  if (args.alibi_slopes) return "it has no ALiBi";
  if (args.sinks) return "it has no sinks";
  if (args.dropout_seed) return "it has no dropout";
  for (const Operand& x : {args.q, args.k, args.v}) {
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return "q, k or v is not aligned to 16 bytes";
    for (const int64_t stride : {x.batch, x.head, x.row}) {
      if (stride % 8 != 0 || stride < 0) return "a stride of q, k or v is not a multiple of 8 elements";
    }
  }
  // A tensor map's strides are its dimensions' own: an expanded one would need a rank of its own.
  if ((args.B > 1 && (args.q.batch == 0 || args.k.batch == 0 || args.v.batch == 0)) ||
      (args.Hkv > 1 && (args.k.head == 0 || args.v.head == 0)) || (args.Hq > 1 && args.q.head == 0) ||
      (args.Sq > 1 && args.q.row == 0) || (args.Sk > 1 && (args.k.row == 0 || args.v.row == 0))) {
    return "q, k or v is expanded along a dimension";
  }
  if (reinterpret_cast<uintptr_t>(args.out.data) % 16 != 0 || args.out.batch % 8 != 0 ||
      args.out.head % 8 != 0 || args.out.row % 8 != 0) {
    return "out is not aligned to 16 bytes a row";
  }
  if (reinterpret_cast<uintptr_t>(args.bit_tiles) % 16 != 0) return "bit_tiles is not aligned to 16 bytes";
  return nullptr;
}

// [batch, head, row, column] in boxes of 64 columns and so many rows of one head.
template <class T>
const char* make_rows_map(TensorMap& map, const Operand& x, int batches, int heads, int rows, int columns,
                          int box_rows) {
  // A dimension of one may come with any stride; a row's length is always allowed.
  const auto bytes = [=](int64_t stride, int size) { return uint64_t(size > 1 ? stride : columns) * 2; };
  return make_tensor_map(map, {x.data,
                               std::is_same_v<T, bf16>,
                               4,
                               {uint64_t(columns), uint64_t(rows), uint64_t(heads), uint64_t(batches)},
                               {bytes(x.row, rows), bytes(x.head, heads), bytes(x.batch, batches)},
                               {64, uint32_t(box_rows), 1, 1},
                               Swizzle::B128});
}

// Starts the kernel on `multiprocessors` blocks; T and kD are the call's. `next_tile` is one zeroed counter
// on the device, alive until the kernel ends. Null, or what went wrong.
template <class T, int kD>
const char* launch_attention_sm90(const AttentionArgs& args, unsigned* next_tile, int multiprocessors,
                                  cudaStream_t stream) {
  using Smem = SmemSm90<T, kD>;
  constexpr int64_t kCacheBytes = 32 << 20;  // of a second-level cache of 50 MB
  if (args.B == 0 || args.Hq == 0 || args.Sq == 0) return nullptr;
  const ScheduleSm90 schedule = make_schedule(args, Smem::kM, next_tile, kCacheBytes);
  TensorMap q_map, k_map, v_map;
  const char* refused = make_rows_map<T>(q_map, args.q, args.B, args.Hq, args.Sq, kD, Smem::kM);
  k_map = v_map = q_map;  // without keys nothing is loaded through them
  if (!refused && args.Sk > 0) {
    refused = make_rows_map<T>(k_map, args.k, args.B, args.Hkv, args.Sk, kD, Smem::kN);
    if (!refused) refused = make_rows_map<T>(v_map, args.v, args.B, args.Hkv, args.Sk, kD, Smem::kN);
  }
  if (refused) return refused;
  const int blocks = schedule.tiles < multiprocessors ? schedule.tiles : multiprocessors;
  const cudaError_t error =
      launch(attention_sm90<T, kD>, dim3(unsigned(blocks)), dim3((TileSm90<kD>::kConsumers + 1) * 128),
             sizeof(Smem), stream, q_map, k_map, v_map, args, schedule);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastattn::cuda
