// SPDX-License-Identifier: Apache-2.0
// The launchers that dispatch.cpp puts together. All enqueue on the current device.
#pragma once

#include "lora/gemm.h"
#include "lora/lora.h"
#include "lora/skinny.h"

namespace pyfast::lora {

// How a grid follows the one before it in the stream.
enum class Order {
  kAlone,   // when that one has ended
  kAfter,   // launched early; waits for its end before it reads
  kBeside,  // launched early; needs nothing of it, and ends after it
};

// Most ranks of one skinny product.
inline constexpr int kSkinnyRank = 128;

struct SkinnyProduct {
  SkinnyArgs args;
  Order order = Order::kAlone;
};

// One product, or two of columns with as many ranks and without dropout in one launch: `second` may
// wait for the grid before where `first` need not.
std::int64_t skinny_workspace(const SkinnyArgs& args, int sm_count);
void launch_skinny_bf16(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                        void* stream);
void launch_skinny_f16(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                       void* stream);

// Copies a matrix into a pitch, a type and an orientation that the kernels take, zeros around it.
struct PackArgs {
  const void* from = nullptr;  // [rows, cols], contiguous
  DType from_dtype = DType::f32;
  int rows = 0, cols = 0;
  bool transpose = false;
  void* to = nullptr;  // [lines, pitch]
  DType to_dtype = DType::bf16;
  int lines = 0;
  int before = 0;  // columns ahead of the copy
  std::int64_t pitch = 0;
};
struct Packs {
  PackArgs args[6];
  int count = 0;
};
void launch_pack(const Packs& packs, void* stream);

// Adds up what a GEMM has made as SideParts; without parts there is nothing to do.
struct SideSum {
  const float* parts = nullptr;  // [rows][width / 64] tiles of 64 columns and 16 ranks
  int rows = 0, width = 0;
  int columns = 0, rank = 0;
  float scale = 1.0F;
  void* out = nullptr;
  std::int64_t pitch = 0;
  DType dtype = DType::bf16;
  bool by_rank = false;     // stored [rank, columns]
  bool accumulate = false;  // added to what is there
};
void launch_side_parts(const SideSum& first, const SideSum& second, DType dtype, void* stream);

// `early`: launched while the grid before it still runs, which must be the one that makes z.
void launch_gemm_sm90_bf16_tn(const GemmArgs&, const GemmPlan&, int sm_count, bool early, void*);
void launch_gemm_sm90_bf16_nn(const GemmArgs&, const GemmPlan&, int sm_count, bool early, void*);
void launch_gemm_sm90_f16_tn(const GemmArgs&, const GemmPlan&, int sm_count, bool early, void*);
void launch_gemm_sm90_f16_nn(const GemmArgs&, const GemmPlan&, int sm_count, bool early, void*);
void launch_gemm_sm80_bf16_tn(const GemmArgs&, const GemmPlan&, void* stream);
void launch_gemm_sm80_bf16_nn(const GemmArgs&, const GemmPlan&, void* stream);
void launch_gemm_sm80_f16_tn(const GemmArgs&, const GemmPlan&, void* stream);
void launch_gemm_sm80_f16_nn(const GemmArgs&, const GemmPlan&, void* stream);

}  // namespace pyfast::lora
