// SPDX-License-Identifier: Apache-2.0
// In which order the adapter's kernels are launched.
#include <algorithm>
#include <utility>

#include "adapter/kernels.h"
#include "adapter/scale.h"
#include "adapter/scaled_gemm.h"
#include "common/check.h"
#include "common/launch.h"

#ifdef PYFAST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pyfast::adapter {
namespace {

constexpr std::string_view kOp = "adapter_bottleneck";
constexpr std::string_view kName = "adapter_bottleneck_cuda";
constexpr std::string_view kScale = "adapter_scale_backward";
constexpr std::string_view kScaleName = "adapter_scale_backward_cuda";
constexpr std::string_view kScaled = "scaled_linear_backward";
constexpr std::string_view kScaledName = "scaled_linear_backward_sm90";

#ifdef PYFAST_CUDA

#ifdef PYFAST_SM90
bool by_wgmma(std::int64_t r, int device) {
  return r > kNarrowRank && cuda_device(device).sm / 10 == 9;
}
#endif

Launchers launchers(const Problem& problem, [[maybe_unused]] int device) {
  const bool bf16 = problem.dtype == DType::bf16;
  Launchers chosen = bf16 ? launchers_bf16() : launchers_f16();
#ifdef PYFAST_SM90
  if (by_wgmma(problem.r, device)) {
    static_cast<Products&>(chosen) = bf16 ? products_sm90_bf16() : products_sm90_f16();
  }
#endif
  return chosen;
}

Cuts cuts_of(std::int64_t m, std::int64_t k, std::int64_t r, int device) {
  const int sm_count = cuda_device(device).sm_count;
#ifdef PYFAST_SM90
  if (by_wgmma(r, device)) return cuts_sm90(m, k, r, sm_count);
#endif
  return cuts(m, k, r, sm_count);
}

void check(const Problem& problem, const Placement& place) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 256;
  PYFAST_CHECK(!place.on_cpu(), kOp, ": these kernels run on cuda");
  PYFAST_CHECK(problem.dtype == DType::f16 || problem.dtype == DType::bf16, kOp,
               ": dtype must be 1 (float16) or 2 (bfloat16), got ",
               static_cast<int>(problem.dtype));
  PYFAST_CHECK(problem.m > 0 && problem.m <= kMost, kOp, ": rows must be from 1 to ", kMost,
               ", got ", problem.m);
  PYFAST_CHECK(problem.k > 0 && problem.k <= kMost && problem.k % 8 == 0, kOp,
               ": features must be a multiple of 8 from 8 to ", kMost, ", got ", problem.k);
  PYFAST_CHECK(problem.r > 0 && problem.r <= kMostRank && problem.r % 8 == 0, kOp,
               ": the bottleneck's size must be a multiple of 8 from 8 to ", kMostRank, ", got ",
               problem.r);
  check_pointer(kOp, "x", problem.x);
  check_pointer(kOp, "down", problem.down);
  check_pointer(kOp, "up", problem.up);
  check_pointer(kOp, "h", problem.h);
  check_pointer(kOp, "workspace", problem.workspace);
  if (problem.norm_weight != nullptr) check_pointer(kOp, "stats", problem.stats);
}

// The regions of the workspace.
struct Layout {
  Layout(std::int64_t m, std::int64_t k, std::int64_t r, int device)
      : cuts(cuts_of(m, k, r, device)) {
    const std::int64_t bands = cuts.grads.bands, slabs = cuts.rows.slabs;
    active = take(m * r * 2);
    const std::int64_t blocks = slabs > 1 ? cuts.rows.bands * slabs : 0;
    rows_parts = take(blocks * cuts.rows_part * 4);
    forward_end = end;
    weighted = take(r * k * 2);
    ranks = take(r * 16);
    std::swap(end, forward_end);  // the backward's regions lie where the forward's were
    dh = take(m * r * 2);
    lines = take(m * 16);
    down_parts = take(bands * k * r * 4);
    up_parts = take(bands * k * r * 4);
    dy_parts = take(bands * k * 4);
    dh_parts = take(bands * r * 4);
    end = std::max(end, forward_end);
  }
  std::int64_t take(std::int64_t bytes) {
    const std::int64_t begin = end;
    end += ceil_div(bytes, 128) * 128;
    return begin;
  }
  Cuts cuts;
  std::int64_t end = 0, forward_end = 0;
  std::int64_t active, rows_parts, weighted, ranks, dh, lines, down_parts, up_parts, dy_parts,
      dh_parts;
};

template <class T>
T* at(void* workspace, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

// What both directions tell the kernels that make h or dh.
RowsArgs rows_args(const Problem& problem, const Layout& layout) {
  RowsArgs args;
  args.rows = static_cast<int>(problem.m);
  args.cols = static_cast<int>(problem.k);
  args.rank = static_cast<int>(problem.r);
  args.activation = problem.activation;
  args.stats = problem.norm_weight != nullptr ? problem.stats : nullptr;
  args.h = problem.h;
  args.active = at<void>(problem.workspace, layout.active);
  args.cut = layout.cuts.rows;
  args.parts = at<float>(problem.workspace, layout.rows_parts);
  return args;
}

#endif

}  // namespace

#ifdef PYFAST_CUDA

std::string missing(std::int64_t r, int device) {
  const int sm = cuda_device(device).sm;
  if (sm < 80) {
    return concat("the kernels need compute capability 8.0, device ", device, " has ", sm / 10, ".",
                  sm % 10);
  }
  int most = 0;
  CUDA_CHECK(kOp, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int needed = most_shared_bytes(r);
  if (needed <= most) return {};
  return concat("the kernels for a bottleneck of ", r, " need ", needed / 1024,
                " KiB of shared memory, device ", device, " has ", most / 1024);
}

std::int64_t workspace(std::int64_t m, std::int64_t k, std::int64_t r, int device) {
  return Layout(m, k, r, device).end;
}

std::string_view forward(const Forward& params, const Placement& place) {
  check(params, place);
  check_pointer(kOp, "y", params.y);
  const DeviceGuard guard(place.device);
  const Layout layout(params.m, params.k, params.r, place.device);
  const Launchers launch = launchers(params, place.device);

  RowsArgs rows = rows_args(params, layout);
  rows.t = params.x;
  rows.pitch = params.pitch_x;
  rows.factor = params.down;
  rows.eps = params.eps;
  rows.bias = params.down_bias;
  if (params.norm_weight != nullptr) {
    WeighArgs weigh;
    weigh.down = params.down;
    weigh.weight = params.norm_weight;
    weigh.bias = params.norm_bias;
    weigh.down_bias = params.down_bias;
    weigh.weighted = at<void>(params.workspace, layout.weighted);
    weigh.ranks = at<float>(params.workspace, layout.ranks);
    weigh.sums = params.stats + 2 * params.m;
    weigh.rank = rows.rank;
    weigh.cols = rows.cols;
    launch.weigh(weigh, place.stream);
    rows.factor = weigh.weighted;
    rows.ranks = weigh.ranks;
  }
  launch.rows(rows, false, place.stream);

  UpArgs up;
  up.x = params.x;
  up.pitch_x = params.pitch_x;
  up.active = rows.active;
  up.up = params.up;
  up.bias = params.up_bias;
  up.y = params.y;
  up.rows = rows.rows, up.cols = rows.cols, up.rank = rows.rank;
  up.cut = layout.cuts.up;
  launch.up(up, place.stream);
  return kName;
}

std::string_view backward(const Backward& params, const Placement& place) {
  check(params, place);
  check_pointer(kOp, "dy", params.dy);
  const DeviceGuard guard(place.device);
  const Layout layout(params.m, params.k, params.r, place.device);
  const Launchers launch = launchers(params, place.device);
  const bool norm = params.norm_weight != nullptr, wants_down = params.d_down != nullptr;

  RowsArgs rows = rows_args(params, layout);
  rows.t = params.dy;
  rows.pitch = params.pitch_dy;
  rows.factor = params.up;
  if (params.active != nullptr) rows.active = params.active;
  rows.dh = at<void>(params.workspace, layout.dh);
  rows.lines = norm ? at<float>(params.workspace, layout.lines) : nullptr;
  launch.rows(rows, true, place.stream);

  GradsArgs grads;
  grads.dy = params.dy;
  grads.pitch_dy = params.pitch_dy;
  grads.x = params.x;
  grads.pitch_x = params.pitch_x;
  grads.dh = rows.dh;
  grads.active = rows.active;
  grads.lines = rows.lines;
  grads.down = params.down;
  grads.weight = params.norm_weight;
  grads.dx = params.dx;
  const auto parts = [&](bool wanted, std::int64_t offset) {
    return wanted ? at<float>(params.workspace, offset) : nullptr;
  };
  grads.down_parts = parts(wants_down || params.d_norm_weight != nullptr, layout.down_parts);
  grads.up_parts = parts(params.d_up != nullptr, layout.up_parts);
  grads.dy_parts = parts(params.d_up_bias != nullptr, layout.dy_parts);
  grads.dh_parts = parts(params.d_down_bias != nullptr || params.d_norm_bias != nullptr ||
                             (wants_down && params.norm_bias != nullptr),
                         layout.dh_parts);
  grads.rows = rows.rows, grads.cols = rows.cols, grads.rank = rows.rank;
  grads.cut = layout.cuts.grads;
  const bool sums = grads.down_parts != nullptr || grads.up_parts != nullptr ||
                    grads.dy_parts != nullptr || grads.dh_parts != nullptr;
  if (sums || params.dx != nullptr) launch.grads(grads, place.stream);
  if (!sums) return kName;

  SumArgs sum;
  sum.down_parts = grads.down_parts;
  sum.up_parts = grads.up_parts;
  sum.dy_parts = grads.dy_parts;
  sum.dh_parts = grads.dh_parts;
  sum.down = params.down;
  sum.weight = params.norm_weight;
  sum.bias = params.norm_bias;
  sum.d_down = params.d_down;
  sum.d_up = params.d_up;
  sum.d_down_bias = params.d_down_bias;
  sum.d_up_bias = params.d_up_bias;
  sum.d_weight = params.d_norm_weight;
  sum.d_bias = params.d_norm_bias;
  sum.bands = layout.cuts.grads.bands;
  sum.cols = rows.cols, sum.rank = rows.rank;
  launch.sum(sum, place.stream);
  return kName;
}

std::string_view scale_backward(const ScaleArgs& args, const Placement& place) {
  PYFAST_CHECK(!place.on_cpu(), kScale, ": this kernel runs on cuda");
  check_dtype(kScale, args.dtype);
  check_dtype(kScale, args.scale_dtype);
  PYFAST_CHECK(args.rows > 0 && args.cols > 0 && args.cols % 8 == 0, kScale,
               ": rows and columns must be positive, columns a multiple of 8, got ", args.rows,
               " and ", args.cols);
  check_pointer(kScale, "dy", args.dy);
  check_pointer(kScale, "x", args.x);
  check_pointer(kScale, "scale", args.scale);
  if (args.d_scale != nullptr) check_pointer(kScale, "parts", args.parts);
  const DeviceGuard guard(place.device);
  launch_scale(args, cuda_device(place.device).sm_count, place.stream);
  return kScaleName;
}

std::string scaled_gemm_missing([[maybe_unused]] std::int64_t m, [[maybe_unused]] std::int64_t n,
                                [[maybe_unused]] std::int64_t k, [[maybe_unused]] int device) {
#ifdef PYFAST_SM90
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 256;
  const int sm = cuda_device(device).sm;
  if (sm / 10 != 9) {
    return concat("the GEMM needs compute capability 9.0, device ", device, " has ", sm / 10, ".",
                  sm % 10);
  }
  if (n <= 0 || k <= 0 || n % 8 != 0 || k % 8 != 0) {
    return concat("in and out features must be multiples of 8, got ", k, " and ", n);
  }
  if (m <= 0 || std::max({m, n, k}) > kMost) {
    return concat("rows and features must be from 1 to ", kMost);
  }
  if (lora::plan_gemm(false, m, k, n).kernel < 0) {
    return concat("torch's GEMM is faster for ", m, " rows, ", k, " to ", n, " features");
  }
  return {};
#else
  return "this build has no kernels for sm_90a";
#endif
}

std::int64_t scaled_gemm_workspace(std::int64_t m, std::int64_t k) {
  return ceil_div(m, kScaledTileM) * ceil_div(k, kScaledTileN) * kScaledTileN * 4;
}

std::string_view scaled_gemm(const ScaledGemmArgs& args, const Placement& place) {
  PYFAST_CHECK(!place.on_cpu(), kScaled, ": this kernel runs on cuda");
  const std::string missing = scaled_gemm_missing(args.m, args.n, args.k, place.device);
  PYFAST_CHECK(missing.empty(), kScaled, ": ", missing);
  check_dtype(kScaled, args.d_scale_dtype);
  check_pointer(kScaled, "dy", args.dy);
  check_pointer(kScaled, "weight", args.w);
  check_pointer(kScaled, "x", args.x);
  check_pointer(kScaled, "scale", args.scale);
  check_pointer(kScaled, "dx", args.dx);
  check_pointer(kScaled, "parts", args.parts);
#ifdef PYFAST_SM90
  const DeviceGuard guard(place.device);
  launch_scaled_gemm_sm90(args, lora::plan_gemm(false, args.m, args.k, args.n),
                          cuda_device(place.device).sm_count, place.stream);
  if (args.d_scale != nullptr) {
    launch_scale_sum({.parts = args.parts,
                      .bands = static_cast<int>(ceil_div(args.m, kScaledTileM)),
                      .pitch = ceil_div(args.k, kScaledTileN) * kScaledTileN,
                      .cols = args.k,
                      .dtype = args.d_scale_dtype,
                      .out = args.d_scale},
                     place.stream);
  }
#endif
  return kScaledName;
}

#endif

std::vector<VariantInfo> variants(std::string_view op) {
  struct Row {
    std::string_view op, name;
    [[maybe_unused]] int min_sm;
  };
  constexpr Row kRows[] = {
      {kOp, kName, 80},
      {"adapter_bottleneck_backward", kName, 80},
      {"adapter_scale", "adapter_scale_cuda", 80},
      {kScale, kScaleName, 80},
      {kScaled, kScaledName, 90},
  };
  for (const Row& row : kRows) {
    if (row.op != op) continue;
#ifdef PYFAST_CUDA
#ifndef PYFAST_SM90
    if (row.min_sm == 90) return {{row.name, true, "this build has no kernels for sm_90a"}};
#endif
    return {{row.name, true, missing_cuda(row.min_sm)}};
#else
    return {{row.name, true, "this build has no CUDA kernels"}};
#endif
  }
  return {};
}

}  // namespace pyfast::adapter
