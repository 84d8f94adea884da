// SPDX-License-Identifier: Apache-2.0
// Which kernels make a LoRA linear, and in which order they are launched.
#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "common/philox.h"
#include "lora/kernels.h"
#include "lora/lora.h"
#include "lora/steps.h"

namespace pyfast::lora {
namespace {

constexpr std::string_view kOp = "lora_linear";

#ifdef PYFAST_CUDA

void check(const Problem& problem, const Placement& place) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 256;
  PYFAST_CHECK(!place.on_cpu(), kOp, ": these kernels run on cuda");
  PYFAST_CHECK(problem.dtype == DType::f16 || problem.dtype == DType::bf16, kOp,
               ": dtype must be 1 (float16) or 2 (bfloat16), got ",
               static_cast<int>(problem.dtype));
  check_dtype(kOp, problem.adapter_dtype);
  for (const std::int64_t size : {problem.m, problem.n, problem.k, problem.r}) {
    PYFAST_CHECK(size > 0 && size <= kMost, kOp, ": sizes must be from 1 to ", kMost, ", got ",
                 size);
  }
  PYFAST_CHECK(problem.pitch_z % 8 == 0 && problem.pitch_z >= problem.r, kOp,
               ": pitch_z must be a multiple of 8 and at least ", problem.r, ", got ",
               problem.pitch_z);
  check_pointer(kOp, "workspace", problem.workspace);
  check_pointer(kOp, "counters", problem.counters);
}

// The common part of the products that contract with, or give, R.
SkinnyArgs skinny(const Problem& problem, const void* t, std::int64_t pitch, std::int64_t cols) {
  SkinnyArgs args;
  args.dtype = problem.dtype;
  args.t = t;
  args.pitch_t = pitch;
  args.rows = static_cast<int>(problem.m);
  args.cols = static_cast<int>(cols);
  args.pitch_p = problem.pitch_z;
  args.counters = problem.counters;
  return args;
}

void add_dropout(const Problem& problem, SkinnyArgs* args) {
  args->seed = problem.seed;
  args->threshold = problem.threshold;
  args->scale *= keep_scale(problem.threshold);
}

// Bytes of partial sums that a skinny product needs at most.
std::int64_t most_partials(const Problem& problem, int sm_count) {
  const auto of = [&](std::int64_t cols, Side side) {
    return partials_of(problem.m, cols, problem.r, side, sm_count);
  };
  return std::max({of(problem.k, Side::kRowsByRank), of(problem.n, Side::kRows),
                   of(problem.n, Side::kColumns), of(problem.k, Side::kColumns)});
}

// Bytes of the regions for partial sums: of z and dz, a pass's or a GEMM's own, of dB and of dA.
struct Partials {
  Partials(const Problem& problem, int sm_count)
      : z(most_partials(problem, sm_count)), db(z), da(z) {
    const auto [m, n, k, r] = std::tuple(problem.m, problem.n, problem.k, problem.r);
    const MakingPlan forward = plan_making(m, n, k, r, false, sm_count);
    const MakingPlan backward = plan_making(m, k, n, r, false, sm_count);
    if (forward.columns > 0 || backward.columns > 0) {
      z = std::max(z, round_up(making_workspace(m, r), 128));
    }
    if (backward.columns > 0 && r <= kSideRank) {
      const int rows = side_part_rows(backward.gemm);
      db = std::max(db, side_part_bytes(rows, n, kSideTileDb));
      da = std::max(da, side_part_bytes(rows, backward.columns, kSideTileDa));
    }
  }
  std::int64_t z, db, da;
};

// Where the GEMM makes z or dz. With dropout there are kernels for W [N, K] alone.
MakingPlan plan_making_of(const Problem& problem, const GemmArgs& args, int device) {
  const bool drops = problem.seed != nullptr;
  if (!making_allowed() || (drops && !problem.by_out)) return {};
  return plan_making(args.m, args.n, args.k, args.r, drops, making_sms(device));
}

// y = x W^T + bias + z B^T; transposed, dx = dy W + dz A. What is in, out and low rank comes after.
GemmArgs gemm_args(const Problem& problem, bool transposed) {
  GemmArgs args;
  args.dtype = problem.dtype;
  args.by_out = problem.by_out != transposed;
  args.w = problem.w, args.pitch_w = problem.pitch_w;
  args.pitch_z = problem.pitch_z;
  args.m = static_cast<int>(problem.m);
  args.n = static_cast<int>(transposed ? problem.k : problem.n);
  args.k = static_cast<int>(transposed ? problem.n : problem.k);
  args.r = static_cast<int>(problem.r);
  args.pitch_y = args.n;
  return args;
}

// dB and dA of what a GEMM has made of them.
void add_side_parts(const Backward& params, const MakingPlan& making, const SideParts& parts,
                    void* stream) {
  const auto sum = [&](const float* from, std::int64_t columns, int tile, float scale, void* out) {
    SideSum sum;
    sum.parts = from;
    sum.rows = std::min(side_part_rows(making.gemm), static_cast<int>(ceil_div(params.m, 256) * 2));
    sum.width = static_cast<int>(round_up(columns, tile));
    sum.columns = static_cast<int>(columns);
    sum.rank = static_cast<int>(params.r);
    sum.scale = scale;
    sum.out = out;
    sum.dtype = params.adapter_dtype;
    return sum;
  };
  SideSum db = sum(parts.db, params.n, kSideTileDb, 1.0F, params.db);
  db.pitch = params.r;
  db.accumulate = params.add_db;
  SideSum da = sum(parts.da, making.columns, kSideTileDa,
                   params.seed != nullptr ? keep_scale(params.threshold) : 1.0F, params.da);
  da.pitch = params.k;
  da.by_rank = true;
  da.accumulate = params.add_da;
  launch_side_parts(db, da, params.dtype, stream);
}

#endif

}  // namespace

#ifdef PYFAST_CUDA

std::int64_t workspace(const Problem& problem, int device) {
  const int sm_count = cuda_device(device).sm_count;
  const std::int64_t pitch_r = round_up(problem.r, 8);
  // Partial sums of products that may run at once, and compute copies of A and B.
  const Partials partials(problem, sm_count);
  return partials.z + partials.db + partials.da +
         2 * round_up(pitch_r * round_up(problem.k, 8) * 2, 128) +
         2 * round_up(pitch_r * round_up(problem.n, 8) * 2, 128);
}

std::string_view gemm_name(const Problem& problem, bool transposed, int device,
                           std::string* reason) {
  *reason = missing_gemm(device, problem.n, problem.k, problem.pitch_w);
  if (!reason->empty()) return {};
  const auto [n, k] =
      transposed ? std::pair(problem.k, problem.n) : std::pair(problem.n, problem.k);
  const GemmPlan plan = plan_gemm_on(device, problem.by_out != transposed, problem.m, n, k);
  if (plan.kernel >= 0) return kGemmNames[plan.kernel];
  *reason = concat("torch's GEMM is faster for ", problem.m, " rows, ", problem.k, " to ",
                   problem.n, " features");
  return {};
}

bool makes(const Problem& problem, bool transposed, int device) {
  const auto [n, k] =
      transposed ? std::pair(problem.k, problem.n) : std::pair(problem.n, problem.k);
  return plan_making(problem.m, n, k, problem.r, false, making_sms(device)).columns > 0;
}

bool dx_over_x(const Problem& problem, int device) {
  const MakingPlan making =
      plan_making(problem.m, problem.k, problem.n, problem.r, false, making_sms(device));
  return problem.r <= kSideRank && making.columns == problem.k;
}

void gemm(const GemmArgs& args, const GemmPlan& plan, const Placement& place) {
  const DeviceGuard guard(place.device);
  launch_gemm(args, plan, cuda_device(place.device).sm_count, false, place.stream);
}

std::string_view forward(const Forward& params, const Placement& place) {
  check(params, place);
  check_pointer(kOp, "b", params.b);
  check_pointer(kOp, "z", params.z);
  const bool given = params.a == nullptr;
  const DeviceGuard guard(place.device);
  const int sm_count = cuda_device(place.device).sm_count;
  Arena arena(params.workspace);
  void* partials = arena.take(Partials(params, sm_count).z);

  GemmArgs gemm = gemm_args(params, false);
  MakingPlan making;  // where the GEMM makes z
  if (params.w != nullptr && !given) making = plan_making_of(params, gemm, place.device);
  if (params.columns != nullptr && making.columns > 0) {
    making.gemm.kernel = kGemmMaking16Scaled;
    if (params.r > kSideRank) making = {};
  }
  const bool makes = making.columns > 0;
  Factors factors(params.dtype, params.adapter_dtype, arena);
  Factor a, b;
  if (!given) a = factors.take(params.a, params.r, params.k, makes && !params.by_out);
  if (params.w != nullptr) b = factors.take(params.b, params.n, params.r, !params.by_out);
  const Order order = factors.launch(place.stream);

  if (makes) {
    gemm.making = {a.data,         a.pitch,      gemm.r,
                   params.z,       params.scale, static_cast<float*>(partials),
                   params.counters};
    if (params.seed != nullptr) {
      gemm.mask = {params.seed, params.threshold, 1.0F};
      gemm.making.scale *= keep_scale(params.threshold);
    }
  } else if (!given) {
    SkinnyArgs z = skinny(params, params.x, params.pitch_x, params.k);
    z.scale = params.scale;
    z.u = a.data;
    z.pitch_u = a.pitch;
    z.u_by_rank = true;
    z.p = params.z;
    z.partials = static_cast<float*>(partials);
    if (params.seed != nullptr) add_dropout(params, &z);
    by_rank({z, order}, params.r, sm_count, place.stream);
  }
  PYFAST_CHECK(params.columns == nullptr ||
                   (params.w != nullptr && params.by_out && params.dtype == DType::bf16),
               kOp, ": columns are scaled by the GEMM alone, of bfloat16 with W by out feature");
  if (params.w == nullptr) return {};

  gemm.x = params.x, gemm.pitch_x = params.pitch_x;
  gemm.z = params.z;
  gemm.b = b.data, gemm.pitch_b = b.pitch;
  gemm.bias = params.bias;
  gemm.columns = params.columns;
  gemm.y = params.y;
  return launch_product(gemm, making, place);
}

std::string_view backward(const Backward& params, const Placement& place) {
  check(params, place);
  check_pointer(kOp, "a", params.a);
  check_pointer(kOp, "dz", params.dz);
  const bool given = params.b == nullptr;
  const DeviceGuard guard(place.device);
  const int sm_count = cuda_device(place.device).sm_count;
  const bool want_dz = params.dx != nullptr || params.da != nullptr;
  const bool gemm_runs = params.dx != nullptr && params.w != nullptr;
  Arena arena(params.workspace);
  // Three that may run at once.
  const Partials sizes(params, sm_count);
  void* partials = arena.take(sizes.z);
  void* partials_db = arena.take(sizes.db);
  void* partials_da = arena.take(sizes.da);

  GemmArgs gemm = gemm_args(params, true);
  if (params.seed != nullptr) {
    gemm.mask = {params.seed, params.threshold, keep_scale(params.threshold)};
  }
  MakingPlan making;  // where the GEMM makes dz
  if (gemm_runs && !given) making = plan_making_of(params, gemm, place.device);
  const bool makes = making.columns > 0;
  Factors factors(params.dtype, params.adapter_dtype, arena);
  Factor a, b;
  if (want_dz && !given) {
    b = factors.take(params.b, params.n, params.r, makes && !params.by_out);
  }
  if (gemm_runs) a = factors.take(params.a, params.r, params.k, !params.by_out);
  Order order = factors.launch(place.stream);

  SkinnyArgs dz = skinny(params, params.dy, params.pitch_dy, params.n), db = dz;
  dz.partials = static_cast<float*>(partials);
  dz.scale = params.scale;
  dz.u = b.data;
  dz.pitch_u = b.pitch;
  dz.p = params.dz;
  db.partials = static_cast<float*>(partials_db);
  db.counters += kCountersDb;
  db.v = params.z;
  db.pitch_v = params.pitch_z;
  db.q = params.db;
  db.pitch_q = params.r;
  db.dtype_q = params.adapter_dtype;
  db.accumulate = params.add_db;
  SkinnyArgs da = skinny(params, params.x, params.pitch_x, params.k);
  da.counters += kCountersDa;
  da.v = params.dz;
  da.pitch_v = params.pitch_z;
  da.q = params.da;
  da.pitch_q = params.k;
  da.dtype_q = params.adapter_dtype;
  da.accumulate = params.add_da;
  da.q_by_rank = true;
  da.partials = static_cast<float*>(partials_da);
  if (params.seed != nullptr) add_dropout(params, &da);
  const bool side = makes && params.r <= kSideRank;  // the GEMM makes parts of dB and dA too
  PYFAST_CHECK(params.dx != params.x || params.dx == nullptr ||
                   (side && making.columns == params.k && params.seed == nullptr),
               kOp, ": dx cannot take the place of x here");
  std::string_view name;
  if (gemm_runs) {
    gemm.x = params.dy, gemm.pitch_x = params.pitch_dy;
    gemm.z = params.dz;
    gemm.b = a.data, gemm.pitch_b = a.pitch;
    gemm.y = params.dx;
    if (makes) {
      gemm.making = {b.data,       b.pitch,     gemm.r,         params.dz,
                     params.scale, dz.partials, params.counters};
      if (side) {
        gemm.side = {params.z, params.pitch_z, params.db != nullptr ? db.partials : nullptr,
                     params.x, params.pitch_x, params.da != nullptr ? da.partials : nullptr};
      }
    } else if (!given) {
      by_rank({dz, order}, params.r, sm_count, place.stream);
    }
    name = launch_product(gemm, making, place);
    order = Order::kBeside;  // on SMs that the GEMM leaves free
  } else if (want_dz && !given) {
    by_rank({dz, order}, params.r, sm_count, place.stream);
    order = Order::kAlone;
  }
  if (side) {
    add_side_parts(params, making, gemm.side, place.stream);
    if (params.da != nullptr && making.columns < params.k) {  // what the second GEMM is for
      da.t = advance(da.t, making.columns, params.dtype);
      da.q = advance(da.q, making.columns, params.adapter_dtype);
      da.cols -= static_cast<int>(making.columns);
      by_rank({da, Order::kAfter}, params.r, sm_count, place.stream);
    }
    return name;
  }
  // dz is there when the last GEMM begins, unless that is the one that makes it.
  const Order order_da = makes && making.columns == gemm.n ? Order::kAfter : order;
  if (params.db != nullptr && params.da != nullptr && params.r <= kSkinnyRank &&
      params.seed == nullptr) {
    da.rank = db.rank = static_cast<int>(params.r);
    const SkinnyProduct second{da, order_da};
    launch_products({db, order}, &second, sm_count, place.stream);
    return name;
  }
  if (params.db != nullptr) by_rank({db, order}, params.r, sm_count, place.stream);
  if (params.da != nullptr) {
    const bool follows = params.db != nullptr && params.r > kSkinnyRank;  // several launches of dB
    by_rank({da, follows ? Order::kAlone : order_da}, params.r, sm_count, place.stream);
  }
  return name;
}

#endif

std::vector<VariantInfo> variants(std::string_view op) {
  if (op != kOp) return {};
#ifdef PYFAST_CUDA
  // On sm_80 dropout in dx is composed around torch's GEMM, and no GEMM makes z.
  return {{"lora_linear_sm90", true, missing_cuda(90)},
          {"lora_linear_sm80", true, missing_cuda(80)}};
#else
  return {{"lora_linear_sm90", true, "this build has no CUDA kernels"}};
#endif
}

}  // namespace pyfast::lora
