// SPDX-License-Identifier: Apache-2.0
// The bottleneck adapter: with n = norm(x) (or x), h = n D^T + d and a = act(h)
//
//   y = x + a U^T + u      dh = act'(h) (dy U)      dx = dy + norm'(dh D)
//   dD = dh^T n      dU = dy^T a      and the sums of dh and dy that the biases and the norm need
//
// Letters: M tokens, K features, R bottleneck size; D [R, K], U [K, R]. Sums are in float32.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/dtype.h"
#include "common/variant.h"

namespace pyfast::adapter {

inline constexpr int kMostRank = 256;

// The codes are part of the Python interface.
enum class Activation : int { silu = 0, gelu = 1, relu = 2 };

// What both directions share. All are of one 2-byte type, but for the statistics, and on 16 bytes;
// D, U and the vectors contiguous; K and R are multiples of 8.
struct Problem {
  DType dtype = DType::bf16;
  Activation activation = Activation::silu;
  std::int64_t m = 0, k = 0, r = 0;
  const void* x = nullptr;
  std::int64_t pitch_x = 0;  // of elements, a multiple of 8
  const void* down = nullptr;
  const void* up = nullptr;
  const void* norm_weight = nullptr;  // null: no norm
  const void* norm_bias = nullptr;
  void* h = nullptr;  // [M, R]
  // With a norm, float32 [M + R, 2]: mean and 1 / deviation of each row of x; then for each rank
  // the sum of D w, and that of D b with d.
  float* stats = nullptr;
  void* workspace = nullptr;  // workspace() bytes on 128 bytes
};

struct Forward : Problem {
  float eps = 0;
  const void* down_bias = nullptr;
  const void* up_bias = nullptr;
  void* y = nullptr;  // [M, K]
};

struct Backward : Problem {
  const void* dy = nullptr;
  std::int64_t pitch_dy = 0;
  void* active = nullptr;  // where a [M, R] is to be left; may be null
  // Each may be null: not wanted.
  void* dx = nullptr;
  void* d_down = nullptr;
  void* d_up = nullptr;
  void* d_down_bias = nullptr;
  void* d_up_bias = nullptr;
  void* d_norm_weight = nullptr;
  void* d_norm_bias = nullptr;
};

// Empty when the kernels can run on the device, else why not.
std::string missing(std::int64_t r, int device);

// Bytes that either direction needs at most.
std::int64_t workspace(std::int64_t m, std::int64_t k, std::int64_t r, int device);

// Enqueue everything; return the kernels' name.
std::string_view forward(const Forward& params, const Placement& place);
std::string_view backward(const Backward& params, const Placement& place);

std::vector<VariantInfo> variants(std::string_view op);

}  // namespace pyfast::adapter
