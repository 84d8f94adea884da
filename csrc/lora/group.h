// SPDX-License-Identifier: Apache-2.0
// LoRA linears that share their input: for each member i
//
//   z_i = s x A_i^T      y_i  = x W_i^T + bias_i + z_i B_i^T
//   dz_i = s dy_i B_i    dx   = sum_i dy_i W_i + dz_i A_i    dA_i = dz_i^T x    dB_i = dy_i^T z_i
//
// The z_i lie side by side in Z, each from a multiple of 8 columns on, zeros between them. Letters
// as in lora.h; W_i are stored [N_i, K]; no dropout.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "lora/lora.h"

namespace pyfast::lora {

inline constexpr int kMembers = 1 + kMorePairs;

struct Member {
  std::int64_t n = 0, r = 0;
  std::int64_t first = 0;  // column of Z
  const void* w = nullptr;
  std::int64_t pitch_w = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  const void* bias = nullptr;  // forward
  void* y = nullptr;           // [M, N]
  const void* dy = nullptr;    // backward
  std::int64_t pitch_dy = 0;
  void* da = nullptr;  // either may be null: not wanted
  void* db = nullptr;
  bool add_da = false, add_db = false;  // to what is there
};

// In a backward the members are those that have a dy; their dz_i lie side by side like the z_i.
struct Group {
  DType dtype = DType::bf16;
  DType adapter_dtype = DType::bf16;
  std::int64_t m = 0, k = 0;
  const void* x = nullptr;
  std::int64_t pitch_x = 0;
  float scale = 1.0F;
  void* z = nullptr;  // [M, pitch_z]
  std::int64_t pitch_z = 0;
  void* dz = nullptr;  // backward, [M, the members' columns]
  bool given = false;  // z, or in a backward dz, is in its place
  void* dx = nullptr;  // null: not wanted
  void* workspace = nullptr;
  unsigned* counters = nullptr;
  int count = 0;
  Member members[kMembers];
};

// Bytes that either direction needs at most; of members only n and r count.
std::int64_t group_workspace(const Group& group, int device);

// The GEMM of the widest y, or that of dx; empty where torch's is the better one for one of them or
// ours cannot run, and then `reason` says why.
std::string_view group_gemm_name(const Group& group, bool transposed, int device,
                                 std::string* reason);

// Whether that GEMM makes Z, or all dz_i, itself.
bool group_makes(const Group& group, bool transposed, int device);

// Enqueue everything. Return the name of that GEMM as it ran, empty where none did.
std::string_view group_forward(const Group& group, const Placement& place);
std::string_view group_backward(const Group& group, const Placement& place);

}  // namespace pyfast::lora
