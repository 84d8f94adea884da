// SPDX-License-Identifier: Apache-2.0
// The launchers that dispatch.cpp puts together. All enqueue on the current device; each grid but
// the first waits for the one before it.
#pragma once

#include "adapter/adapter.h"

namespace pyfast::adapter {

// How a kernel cuts [M, K]: bands of so many chunks of rows, times slabs of columns.
struct Cut {
  int chunks = 1;  // of a band
  int bands = 1;
  int slabs = 1;
  int rows = 0;  // of a block, where it may have more or fewer
};

// D with the norm's weight, a power of two per rank that makes it fit any type, and its sums.
struct WeighArgs {
  const void* down = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;       // of the norm
  const void* down_bias = nullptr;  //
  void* weighted = nullptr;         // [R, K]
  float* ranks = nullptr;           // [R, 4]: one over the power, sum of `weighted`, d with D b
  float* sums = nullptr;            // [R, 2]: the part of the statistics
  int rank = 0, cols = 0;
};

// The products with R columns: h from x, or dh from dy.
struct RowsArgs {
  const void* t = nullptr;  // x or dy
  std::int64_t pitch = 0;
  const void* factor = nullptr;  // D, weighted where there is a norm; or U
  int rows = 0, cols = 0, rank = 0;
  Activation activation = Activation::silu;
  float eps = 0;
  const void* bias = nullptr;    // d, where there is no norm
  const float* ranks = nullptr;  // of WeighArgs, where there is one
  float* stats = nullptr;        // forward writes, backward reads; null: no norm
  void* h = nullptr;             // the same
  void* dh = nullptr;
  void* active = nullptr;  // [M, R] act(h)
  // [M, 4]: mean, 1 / deviation, and the two sums of the norm's gradient as a line in x.
  float* lines = nullptr;
  // Bands are blocks of rows. Several slabs leave Cuts::rows_part floats each for one more
  // kernel, but for those of sm90, which are a cluster.
  Cut cut;
  float* parts = nullptr;
};

// y from x and act(h).
struct UpArgs {
  const void* x = nullptr;
  std::int64_t pitch_x = 0;
  const void* active = nullptr;
  const void* up = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  int rows = 0, cols = 0, rank = 0;
  Cut cut;
};

// dx, and each band's part of the gradients of D, U, u and the norm.
struct GradsArgs {
  const void* dy = nullptr;
  std::int64_t pitch_dy = 0;
  const void* x = nullptr;
  std::int64_t pitch_x = 0;
  const void* dh = nullptr;
  const void* active = nullptr;
  const float* lines = nullptr;  // null: no norm
  const void* down = nullptr;
  const void* weight = nullptr;  // of the norm
  void* dx = nullptr;            // this and the parts may be null: not wanted
  float* down_parts = nullptr;   // [bands, K, R] dh^T xhat
  float* up_parts = nullptr;     // [bands, K, R]
  float* dy_parts = nullptr;     // [bands, K]
  float* dh_parts = nullptr;     // [bands, R]
  int rows = 0, cols = 0, rank = 0;
  Cut cut;
};

// Adds up the bands' parts, in order.
struct SumArgs {
  const float* down_parts = nullptr;
  const float* up_parts = nullptr;
  const float* dy_parts = nullptr;
  const float* dh_parts = nullptr;
  const void* down = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* d_down = nullptr;
  void* d_up = nullptr;
  void* d_down_bias = nullptr;
  void* d_up_bias = nullptr;
  void* d_weight = nullptr;
  void* d_bias = nullptr;
  int bands = 0, cols = 0, rank = 0;
};

// For one element type.
struct Products {
  void (*rows)(const RowsArgs&, bool backward, void* stream);
  void (*up)(const UpArgs&, void* stream);
  void (*grads)(const GradsArgs&, void* stream);
};
struct Launchers : Products {
  void (*weigh)(const WeighArgs&, void* stream);
  void (*sum)(const SumArgs&, void* stream);
};
const Launchers& launchers_bf16();
const Launchers& launchers_f16();

// The same for both types, as they are of one size.
struct Cuts {
  Cut rows, up, grads;
  std::int64_t rows_part = 0;  // floats that a block of several slabs leaves
};
Cuts cuts(std::int64_t m, std::int64_t k, std::int64_t r, int sm_count);
int most_shared_bytes(std::int64_t r);

// The products by wgmma, for ranks above kNarrowRank.
inline constexpr int kNarrowRank = 64;
const Products& products_sm90_bf16();
const Products& products_sm90_f16();
Cuts cuts_sm90(std::int64_t m, std::int64_t k, std::int64_t r, int sm_count);

}  // namespace pyfast::adapter
