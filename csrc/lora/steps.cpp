// SPDX-License-Identifier: Apache-2.0
#include "lora/steps.h"

#include <algorithm>
#include <atomic>

#include "common/check.h"

#ifdef PYFAST_CUDA

namespace pyfast::lora {
namespace {

std::atomic<int> forced_sm = 0;

}  // namespace

PackArgs& Factors::next(const void* from, std::int64_t rows, std::int64_t cols) {
  PackArgs& pack = packs_.args[packs_.count++];
  pack.from = from;
  pack.from_dtype = adapter_dtype_;
  pack.rows = static_cast<int>(rows);
  pack.cols = static_cast<int>(cols);
  pack.to_dtype = dtype_;
  return pack;
}

Factor Factors::take(const void* from, std::int64_t rows, std::int64_t cols, bool transpose) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(from) % 16 == 0;
  if (!transpose && adapter_dtype_ == dtype_ && cols % 8 == 0 && aligned) return {from, cols};
  PackArgs& pack = next(from, rows, cols);
  pack.transpose = transpose;
  pack.lines = static_cast<int>(transpose ? cols : rows);
  pack.pitch = round_up(transpose ? rows : cols, 8);
  pack.to = arena_.take(pack.lines * pack.pitch * 2);
  return {pack.to, pack.pitch};
}

void Factors::put(const Factor& into, std::int64_t line, std::int64_t lines, std::int64_t before,
                  const void* from, std::int64_t rows, std::int64_t cols) {
  PackArgs& pack = next(from, rows, cols);
  pack.lines = static_cast<int>(lines);
  pack.before = static_cast<int>(before);
  pack.pitch = into.pitch;
  pack.to = advance(const_cast<void*>(into.data), line * into.pitch, dtype_);
}

Order Factors::launch(void* stream) {
  if (packs_.count == 0) return Order::kAlone;
  launch_pack(packs_, stream);
  return Order::kAfter;
}

void launch_products(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                     void* stream) {
  auto* launch = first.args.dtype == DType::bf16 ? launch_skinny_bf16 : launch_skinny_f16;
  launch(first, second, sm_count, stream);
}

void by_rank(SkinnyProduct product, std::int64_t rank, int sm_count, void* stream) {
  constexpr std::int64_t kStep = kSkinnyRank;
  SkinnyArgs& args = product.args;
  for (std::int64_t at = 0; at < rank; at += kStep) {
    args.rank = static_cast<int>(std::min(kStep, rank - at));
    launch_products(product, nullptr, sm_count, stream);
    product.order = Order::kAlone;
    if (args.u != nullptr) {
      args.u = advance(args.u, args.u_by_rank ? kStep * args.pitch_u : kStep, args.dtype);
      args.p = advance(args.p, kStep, args.dtype);
    } else {
      args.v = advance(args.v, kStep, args.dtype);
      args.q = advance(args.q, args.q_by_rank ? kStep * args.pitch_q : kStep, args.dtype_q);
    }
  }
}

std::int64_t partials_of(std::int64_t m, std::int64_t cols, std::int64_t rank, Side side,
                         int sm_count) {
  SkinnyArgs args;
  args.rows = static_cast<int>(m);
  args.cols = static_cast<int>(cols);
  args.u = side == Side::kColumns ? nullptr : &args;  // only whether it is null matters here
  args.u_by_rank = side == Side::kRowsByRank;
  std::int64_t most = 0;
  // The last ranks may be served by a kernel that cuts T otherwise.
  for (const std::int64_t part : {std::min<std::int64_t>(rank, kSkinnyRank), rank % kSkinnyRank}) {
    if (part == 0) continue;
    args.rank = static_cast<int>(part);
    most = std::max(most, skinny_workspace(args, sm_count));
  }
  return round_up(most, 128);
}

void launch_gemm(const GemmArgs& args, const GemmPlan& plan, [[maybe_unused]] int sm_count,
                 [[maybe_unused]] bool early, void* stream) {
  const bool bf16 = args.dtype == DType::bf16;
  if (plan.kernel >= kGemmSm80Wide) {
    auto* launch = args.by_out ? (bf16 ? launch_gemm_sm80_bf16_tn : launch_gemm_sm80_f16_tn)
                               : (bf16 ? launch_gemm_sm80_bf16_nn : launch_gemm_sm80_f16_nn);
    return launch(args, plan, stream);
  }
#ifdef PYFAST_SM90
  auto* launch = args.by_out ? (bf16 ? launch_gemm_sm90_bf16_tn : launch_gemm_sm90_f16_tn)
                             : (bf16 ? launch_gemm_sm90_bf16_nn : launch_gemm_sm90_f16_nn);
  launch(args, plan, sm_count, early, stream);
#else
  PYFAST_CHECK(false, "lora_linear: this build has no kernels for sm_90a");
#endif
}

std::string_view launch_product(const GemmArgs& args, const MakingPlan& making,
                                const Placement& place) {
  const int sm_count = cuda_device(place.device).sm_count;
  int k = args.k;
  for (const Pair& pair : args.more) k += pair.k;
  GemmPlan plan = plan_gemm_on(place.device, args.by_out, args.m, args.n, k);
  if (plan.kernel < kGemmSm80Wide) {
    if (args.mask.seed != nullptr) plan.kernel = kGemmMasked;
    if (args.columns != nullptr) plan.kernel = kGemmScaled;
  }
  if (making.columns == 0) {
    launch_gemm(args, plan, sm_count, true, place.stream);
    return kGemmNames[plan.kernel];
  }
  GemmArgs first = args, rest = args;
  first.n = static_cast<int>(making.columns);
  launch_gemm(first, making.gemm, sm_count, false, place.stream);
  rest.n -= first.n;
  if (rest.n > 0) {
    const auto skip = [&](const void* w, std::int64_t pitch) {
      return advance(w, first.n * (args.by_out ? pitch : 1), args.dtype);
    };
    rest.w = skip(args.w, args.pitch_w);
    rest.b = skip(args.b, args.pitch_b);
    for (Pair& pair : rest.more) {
      if (pair.k > 0) pair.w = skip(pair.w, pair.pitch_w);
    }
    rest.y = advance(args.y, first.n, args.dtype);
    if (args.bias != nullptr) rest.bias = advance(args.bias, first.n, args.dtype);
    if (args.columns != nullptr) rest.columns = args.columns + first.n;
    launch_gemm(rest, plan, sm_count, true, place.stream);
  }
  return kGemmNames[making.gemm.kernel];
}

void force_gemm_sm(int sm) {
  PYFAST_CHECK(sm == 0 || sm == 80, "lora_force_sm: expected 80, or 0 for none, got ", sm);
  forced_sm = sm;
}

int gemm_sm(int device) {
  const int major = cuda_device(device).sm / 10;
  if (forced_sm == 80 || major == 8) return 80;
#ifdef PYFAST_SM90
  if (major == 9) return 90;
#endif
  return 0;
}

GemmPlan plan_gemm_on(int device, bool by_out, std::int64_t m, std::int64_t n, std::int64_t k) {
  if (gemm_sm(device) == 80) return plan_gemm_sm80(m, n, k, cuda_device(device).sm_count);
  return plan_gemm(by_out, m, n, k);
}

int making_sms(int device) { return gemm_sm(device) == 90 ? cuda_device(device).sm_count : 0; }

std::string missing_gemm(int device, std::int64_t n, std::int64_t k, std::int64_t pitch_w) {
  if (gemm_sm(device) == 0) {
    const int sm = cuda_device(device).sm;
    if (sm / 10 == 9) return "this build has no kernels for sm_90a";
    return concat("the GEMM kernels need compute capability 8.x or 9.0, device ", device, " has ",
                  sm / 10, ".", sm % 10);
  }
  if (n % 8 != 0 || k % 8 != 0 || pitch_w % 8 != 0) {
    return concat("in and out features and the weight's pitch must be multiples of 8, got ", k,
                  ", ", n, " and ", pitch_w);
  }
  return {};
}

}  // namespace pyfast::lora

#endif
