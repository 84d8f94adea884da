// SPDX-License-Identifier: Apache-2.0
// The steps that a LoRA linear and a group of them (dispatch.cpp, group.cpp) are put together from.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/launch.h"
#include "lora/kernels.h"

namespace pyfast::lora {

// Where the counters of dB and dA begin, which may run at once: each needs one for 128 columns, and
// a group has a share for every member. Those of z and dz, which run alone, begin at 0.
inline constexpr int kCountersDb = kCounters / 8, kCountersDa = kCounters / 2;

inline std::int64_t round_up(std::int64_t value, std::int64_t to) {
  return ceil_div(value, to) * to;
}

// So many elements further.
inline const char* advance(const void* pointer, std::int64_t elements, DType dtype) {
  return static_cast<const char*>(pointer) + elements * (dtype == DType::f32 ? 4 : 2);
}
inline char* advance(void* pointer, std::int64_t elements, DType dtype) {
  return static_cast<char*>(pointer) + elements * (dtype == DType::f32 ? 4 : 2);
}

// Carves the workspace.
class Arena {
 public:
  explicit Arena(void* base) : next_(static_cast<char*>(base)) {}
  void* take(std::int64_t bytes) {
    char* taken = next_;
    next_ += round_up(bytes, 128);
    return taken;
  }

 private:
  char* next_;
};

// A factor as a kernel takes it.
struct Factor {
  const void* data = nullptr;
  std::int64_t pitch = 0;
};

// The factors as they are, or compute copies of them where the type, the pitch or the orientation
// does not fit; the copies are made by one kernel ahead of the others.
class Factors {
 public:
  Factors(DType dtype, DType adapter_dtype, Arena& arena)
      : dtype_(dtype), adapter_dtype_(adapter_dtype), arena_(arena) {}

  // [rows, cols] or, transposed, [cols, rows].
  Factor take(const void* from, std::int64_t rows, std::int64_t cols, bool transpose);

  // Room for a matrix that is put together of several, and one of these: [rows, cols] to the lines
  // from `line` on and the columns from `before` on; zeros around it in `lines` lines.
  Factor room(std::int64_t lines, std::int64_t pitch) {
    return {arena_.take(lines * pitch * 2), pitch};
  }
  void put(const Factor& into, std::int64_t line, std::int64_t lines, std::int64_t before,
           const void* from, std::int64_t rows, std::int64_t cols);

  // The order in which the next kernel follows.
  Order launch(void* stream);

 private:
  PackArgs& next(const void* from, std::int64_t rows, std::int64_t cols);

  DType dtype_, adapter_dtype_;
  Arena& arena_;
  Packs packs_;
};

// Launches a product for each part of at most kSkinnyRank ranks; the parts follow one another.
void by_rank(SkinnyProduct product, std::int64_t rank, int sm_count, void* stream);
// One, or two of columns at once.
void launch_products(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                     void* stream);

// Bytes of partial sums of a product of [m, cols]: of its rows, with U stored by rank or not, or of
// its columns.
enum class Side { kRowsByRank, kRows, kColumns };
std::int64_t partials_of(std::int64_t m, std::int64_t cols, std::int64_t rank, Side side,
                         int sm_count);

void launch_gemm(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool early,
                 void* stream);
// A GEMM that makes z for itself where `making` says so; else z comes from the kernel before. Its
// name.
std::string_view launch_product(const GemmArgs& args, const MakingPlan& making,
                                const Placement& place);

// Whose kernels serve a device: 90 or 80; 0: none.
int gemm_sm(int device);
GemmPlan plan_gemm_on(int device, bool by_out, std::int64_t m, std::int64_t n, std::int64_t k);
// SMs for GEMMs that make z; 0 where there is no such kernel.
int making_sms(int device);

// Why there is no GEMM of ours on this device or for these features; empty where there is one.
std::string missing_gemm(int device, std::int64_t n, std::int64_t k, std::int64_t pitch_w);

}  // namespace pyfast::lora
