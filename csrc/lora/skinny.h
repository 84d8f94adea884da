// SPDX-License-Identifier: Apache-2.0
// The contract of the skinny products of the LoRA linear.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyfast::lora {

// Either the product of the rows or that of the columns of T[rows, cols]:
//   P[rows, rank] = scale D(T) U        U stored [rank, cols] or [cols, rank]
//   Q[cols, rank] = scale D(T)^T V      V stored [rows, rank], Q like U
// with D the mask of common/philox.h; 1 / (1 - p) is the caller's, as a part of scale. T, U, V and
// P are of one 2-byte type, sums are in float32. Pitches in elements, those of T, U and V multiples
// of 8; T, U, V on 16 bytes. rank is at most 128.
struct SkinnyArgs {
  DType dtype = DType::bf16;
  const void* t = nullptr;
  std::int64_t pitch_t = 0;
  int rows = 0, cols = 0, rank = 0;
  float scale = 1.0F;

  const void* u = nullptr;  // null: Q is wanted
  std::int64_t pitch_u = 0;
  bool u_by_rank = false;  // U is stored [rank, cols]
  void* p = nullptr;
  std::int64_t pitch_p = 0;

  const void* v = nullptr;
  std::int64_t pitch_v = 0;
  void* q = nullptr;
  std::int64_t pitch_q = 0;
  DType dtype_q = DType::bf16;
  bool q_by_rank = false;   // Q is stored [rank, cols]
  bool accumulate = false;  // Q is added to what is there
  // Where there are parts, Q is several matrices: each of so many ranks, from `first` on.
  struct Part {
    void* q = nullptr;
    int first = 0, ranks = 0;
    bool accumulate = false;
  } parts[3];
  int part_count = 0;

  const std::int64_t* seed = nullptr;  // seed and offset; null: no dropout
  std::uint32_t threshold = 0;         // 16 bits below it: dropped

  float* partials = nullptr;     // skinny_workspace() bytes
  unsigned* counters = nullptr;  // ceil(rows / 64) or ceil(cols / 128), zero before and after
};

}  // namespace pyfast::lora
