// SPDX-License-Identifier: Apache-2.0
// LoRA linear: y = x W^T + bias + z B^T with z = s D(x) A^T, and its gradients
//
//   dz = s dy B      dx = dy W + dz A      dA = dz^T D(x)      dB = dy^T z
//
// with D the dropout of common/philox.h (in dx its mask and scale are dz A's). Letters: M tokens, N
// out, K in features, R rank; A [R, K], B [N, R].
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/dtype.h"
#include "common/variant.h"
#include "lora/gemm.h"

namespace pyfast::lora {

// What both directions share. x, dy: [M, K], [M, N] with a pitch of elements; A and B contiguous.
struct Problem {
  DType dtype = DType::bf16;  // of x, W, bias, y, z and their gradients; float16 or bfloat16
  DType adapter_dtype = DType::bf16;  // of A, B, dA and dB
  std::int64_t m = 0, n = 0, k = 0, r = 0;
  const void* x = nullptr;
  std::int64_t pitch_x = 0;
  const void* w = nullptr;  // null: the caller has the products with W made elsewhere
  std::int64_t pitch_w = 0;
  bool by_out = true;  // W is stored [N, K], else [K, N]
  const void* a = nullptr;
  const void* b = nullptr;
  float scale = 1.0F;
  std::int64_t pitch_z = 0;            // of z and dz: R rounded up to 8, zeros beyond R
  const std::int64_t* seed = nullptr;  // seed and offset; null: no dropout
  std::uint32_t threshold = 0;
  void* workspace = nullptr;     // workspace() bytes on 128 bytes
  unsigned* counters = nullptr;  // kCounters of them, zero before and after
};

struct Forward : Problem {
  const void* bias = nullptr;
  const float* columns = nullptr;  // factors of y's columns, not of the bias; needs w
  void* y = nullptr;               // [M, N]
  void* z = nullptr;               // [M, pitch_z]
};

struct Backward : Problem {
  const void* dy = nullptr;
  std::int64_t pitch_dy = 0;
  const void* z = nullptr;
  void* dz = nullptr;                   // [M, pitch_z], needed for dx and dA
  void* dx = nullptr;                   // [M, K]; each of the three may be null: not wanted
  void* da = nullptr;                   // [R, K]
  void* db = nullptr;                   // [N, R]
  bool add_da = false, add_db = false;  // to what is there
};

inline constexpr int kCounters = 1 << 17;

// Bytes that either direction needs at most.
std::int64_t workspace(const Problem& problem, int device);

// Which GEMM kernel serves x W^T (transposed = false) or dy W; empty where torch's is the better
// one or ours cannot run, and then `reason` says why.
std::string_view gemm_name(const Problem& problem, bool transposed, int device,
                           std::string* reason);

std::vector<VariantInfo> variants(std::string_view op);

// Whether the GEMM of a direction makes its z or dz itself, without dropout.
bool makes(const Problem& problem, bool transposed, int device);

// Whether dx may take the place of x in a backward without dropout: one GEMM makes dx and all else,
// each block reading of x just what it overwrites.
bool dx_over_x(const Problem& problem, int device);

// Enqueue everything; with w null only z, or dz, dA and dB. A forward without a, and a backward
// without b, finds z or dz in its place. Return the name of what makes the product with W, empty
// without one.
std::string_view forward(const Forward& params, const Placement& place);
std::string_view backward(const Backward& params, const Placement& place);

// One GEMM by a given plan.
void gemm(const GemmArgs& args, const GemmPlan& plan, const Placement& place);

}  // namespace pyfast::lora
