// SPDX-License-Identifier: Apache-2.0
// The launches of a group of LoRA linears. x is read once for all z_i: by the GEMM of the widest
// member, where that can make them all, or by one pass. dx is one GEMM, whose contraction runs over
// all members, and which makes the dz_i where it can.
#include "lora/group.h"

#include <algorithm>

#include "common/check.h"
#include "lora/steps.h"

#ifdef PYFAST_CUDA

namespace pyfast::lora {
namespace {

constexpr std::string_view kOp = "lora_group";

void check(const Group& group, const Placement& place) {
  PYFAST_CHECK(!place.on_cpu(), kOp, ": these kernels run on cuda");
  PYFAST_CHECK(group.dtype == DType::f16 || group.dtype == DType::bf16, kOp,
               ": dtype must be 1 (float16) or 2 (bfloat16), got ", static_cast<int>(group.dtype));
  check_dtype(kOp, group.adapter_dtype);
  PYFAST_CHECK(group.count > 0 && group.count <= kMembers, kOp, ": needs 1 to ", kMembers,
               " members, got ", group.count);
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 256;
  const auto check_size = [&](std::int64_t size) {
    PYFAST_CHECK(size > 0 && size <= kMost, kOp, ": sizes must be from 1 to ", kMost, ", got ",
                 size);
  };
  check_size(group.m);
  check_size(group.k);
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    check_size(member.n);
    check_size(member.r);
    PYFAST_CHECK(member.first >= 0 && member.first % 8 == 0 &&
                     member.first + member.r <= group.pitch_z && group.pitch_z % 8 == 0,
                 kOp, ": ", member.r, " columns from ", member.first, " on do not fit into ",
                 group.pitch_z);
    check_pointer(kOp, "w", member.w);
    check_pointer(kOp, "a", member.a);
    check_pointer(kOp, "b", member.b);
  }
  check_pointer(kOp, "z", group.z);
  check_pointer(kOp, "workspace", group.workspace);
  check_pointer(kOp, "counters", group.counters);
}

std::int64_t padded(std::int64_t rank) { return round_up(rank, 8); }

// Columns of dz of the members ahead of one, or of all.
std::int64_t columns(const Group& group, int count) {
  std::int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += padded(group.members[i].r);
  return sum;
}
// What dx contracts over, each member's from a multiple of kPairStep on; of all of them.
std::int64_t contracted(const Group& group, int count) {
  std::int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += round_up(group.members[i].n, kPairStep);
  return sum;
}

int widest(const Group& group) {
  int best = 0;
  for (int i = 1; i < group.count; ++i) {
    if (group.members[i].n > group.members[best].n) best = i;
  }
  return best;
}

MakingPlan plan_forward(const Group& group, int sm_count) {
  const std::int64_t n = group.members[widest(group)].n;
  return plan_making(group.m, n, group.k, columns(group, group.count), false, sm_count);
}
MakingPlan plan_backward(const Group& group, int sm_count) {
  return plan_making(group.m, group.k, contracted(group, group.count), columns(group, group.count),
                     false, sm_count);
}

// Bytes of partial sums: of z and dz, a pass's or a GEMM's own; of a member's dB; of dA.
std::int64_t partials_z(const Group& group, int sm_count) {
  const std::int64_t all = columns(group, group.count);
  std::int64_t most = partials_of(group.m, group.k, all, Side::kRowsByRank, sm_count);
  for (int i = 0; i < group.count; ++i) {
    const auto [n, r] = std::pair(group.members[i].n, group.members[i].r);
    most = std::max(most, partials_of(group.m, n, r, Side::kRows, sm_count));
  }
  if (all > kSkinnyRank) return most;  // no GEMM makes them
  return std::max(most, round_up(making_workspace(group.m, all), 128));
}
std::int64_t partials_db(const Group& group, int i, int sm_count) {
  return partials_of(group.m, group.members[i].n, group.members[i].r, Side::kColumns, sm_count);
}
std::int64_t partials_da(const Group& group, int sm_count) {
  const auto of = [&](std::int64_t rank) {
    return partials_of(group.m, group.k, rank, Side::kColumns, sm_count);
  };
  const std::int64_t all = columns(group, group.count);
  if (all <= kSkinnyRank) return of(all);
  std::int64_t most = 0;
  for (int i = 0; i < group.count; ++i) most = std::max(most, of(group.members[i].r));
  return most;
}

// [A_1; A_2; ..], each from a multiple of 8 ranks on.
Factor stacked(const Group& group, Factors& factors) {
  const Factor all = factors.room(columns(group, group.count), group.k);
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    factors.put(all, columns(group, i), padded(member.r), 0, member.a, member.r, group.k);
  }
  return all;
}

SkinnyArgs skinny(const Group& group, const void* t, std::int64_t pitch, std::int64_t cols) {
  SkinnyArgs args;
  args.dtype = group.dtype;
  args.t = t;
  args.pitch_t = pitch;
  args.rows = static_cast<int>(group.m);
  args.cols = static_cast<int>(cols);
  args.counters = group.counters;
  return args;
}

// dA_i of all members, in one pass over x where their ranks fit.
void launch_da(const Group& group, float* partials, Order order, int sm_count, void* stream) {
  const std::int64_t all = columns(group, group.count);
  SkinnyArgs args = skinny(group, group.x, group.pitch_x, group.k);
  args.counters += kCountersDa;
  args.partials = partials;
  args.v = group.dz;
  args.pitch_v = all;
  args.pitch_q = group.k;
  args.dtype_q = group.adapter_dtype;
  args.q_by_rank = true;
  if (all > kSkinnyRank) {
    for (int i = 0; i < group.count; ++i) {
      const Member& member = group.members[i];
      if (member.da == nullptr) continue;
      args.v = advance(group.dz, columns(group, i), group.dtype);
      args.q = member.da;
      args.accumulate = member.add_da;
      by_rank({args, order}, member.r, sm_count, stream);
      order = Order::kAlone;
    }
    return;
  }
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    if (member.da == nullptr) continue;
    args.parts[args.part_count++] = {member.da, static_cast<int>(columns(group, i)),
                                     static_cast<int>(member.r), member.add_da};
  }
  by_rank({args, order}, all, sm_count, stream);
}

}  // namespace

std::int64_t group_workspace(const Group& group, int device) {
  const int sm_count = cuda_device(device).sm_count;
  const std::int64_t all = columns(group, group.count);
  std::int64_t bytes = partials_z(group, sm_count) + partials_da(group, sm_count);
  bytes += round_up(all * group.k * 2, 128);
  bytes += round_up(all * contracted(group, group.count) * 2, 128);
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    bytes += partials_db(group, i, sm_count) + round_up(member.n * padded(member.r) * 2, 128);
  }
  return bytes;
}

std::string_view group_gemm_name(const Group& group, bool transposed, int device,
                                 std::string* reason) {
  const auto named = [&](const GemmPlan& plan, std::int64_t k, std::int64_t n) {
    if (plan.kernel >= 0) return kGemmNames[plan.kernel];
    *reason = concat("torch's GEMM is faster for ", group.m, " rows, ", k, " to ", n, " features");
    return std::string_view();
  };
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    *reason = missing_gemm(device, member.n, group.k, member.pitch_w);
    if (!reason->empty()) return {};
  }
  if (transposed) {
    const std::int64_t n = contracted(group, group.count);
    return named(plan_gemm_on(device, false, group.m, group.k, n), group.k, n);
  }
  std::string_view name;
  for (int i = 0; i < group.count; ++i) {
    const std::int64_t n = group.members[i].n;
    const std::string_view its = named(plan_gemm_on(device, true, group.m, n, group.k), group.k, n);
    if (its.empty()) return {};
    if (i == widest(group)) name = its;
  }
  return name;
}

bool group_makes(const Group& group, bool transposed, int device) {
  const int sm_count = making_sms(device);
  return (transposed ? plan_backward(group, sm_count) : plan_forward(group, sm_count)).columns > 0;
}

std::string_view group_forward(const Group& group, const Placement& place) {
  check(group, place);
  const DeviceGuard guard(place.device);
  const int sm_count = cuda_device(place.device).sm_count;
  const std::int64_t all = columns(group, group.count);
  PYFAST_CHECK(all == group.pitch_z, kOp, ": the members have ", all, " columns of z, got ",
               group.pitch_z);
  Arena arena(group.workspace);
  auto* partials = static_cast<float*>(arena.take(partials_z(group, sm_count)));
  MakingPlan making;
  if (making_allowed() && !group.given) making = plan_forward(group, making_sms(place.device));

  Factors factors(group.dtype, group.adapter_dtype, arena);
  Factor a, b[kMembers];
  if (!group.given) a = stacked(group, factors);
  for (int i = 0; i < group.count; ++i) {
    b[i] = factors.take(group.members[i].b, group.members[i].n, group.members[i].r, false);
  }
  const Order order = factors.launch(place.stream);
  if (making.columns == 0 && !group.given) {
    SkinnyArgs z = skinny(group, group.x, group.pitch_x, group.k);
    z.scale = group.scale;
    z.u = a.data;
    z.pitch_u = a.pitch;
    z.u_by_rank = true;
    z.p = group.z;
    z.pitch_p = group.pitch_z;
    z.partials = partials;
    by_rank({z, order}, all, sm_count, place.stream);
  }
  const auto launch = [&](int i, const MakingPlan& plan) {
    const Member& member = group.members[i];
    GemmArgs gemm;
    gemm.dtype = group.dtype;
    gemm.x = group.x, gemm.pitch_x = group.pitch_x;
    gemm.w = member.w, gemm.pitch_w = member.pitch_w;
    gemm.z = advance(group.z, member.first, group.dtype), gemm.pitch_z = group.pitch_z;
    gemm.b = b[i].data, gemm.pitch_b = b[i].pitch;
    gemm.bias = member.bias;
    gemm.y = member.y, gemm.pitch_y = member.n;
    gemm.m = static_cast<int>(group.m), gemm.n = static_cast<int>(member.n);
    gemm.k = static_cast<int>(group.k), gemm.r = static_cast<int>(member.r);
    if (plan.columns > 0) {
      gemm.making = {a.data,      a.pitch,  static_cast<int>(all), group.z,
                     group.scale, partials, group.counters};
    }
    return launch_product(gemm, plan, place);
  };
  const int first = widest(group);
  const std::string_view name = launch(first, making);
  for (int i = 0; i < group.count; ++i) {
    if (i != first) launch(i, {});
  }
  return name;
}

std::string_view group_backward(const Group& group, const Placement& place) {
  check(group, place);
  check_pointer(kOp, "dz", group.dz);
  const DeviceGuard guard(place.device);
  const int sm_count = cuda_device(place.device).sm_count;
  const std::int64_t all = columns(group, group.count);
  const bool want_da = std::any_of(group.members, group.members + group.count,
                                   [](const Member& member) { return member.da != nullptr; });
  Arena arena(group.workspace);
  auto* partials = static_cast<float*>(arena.take(partials_z(group, sm_count)));
  auto* da_partials = static_cast<float*>(arena.take(partials_da(group, sm_count)));
  MakingPlan making;
  if (group.dx != nullptr && making_allowed() && !group.given) {
    making = plan_backward(group, making_sms(place.device));
  }
  const bool makes = making.columns > 0;
  const bool passes = !makes && !group.given && (want_da || group.dx != nullptr);

  Factors factors(group.dtype, group.adapter_dtype, arena);
  Factor a, b_all, b[kMembers];
  if (group.dx != nullptr) a = stacked(group, factors);
  if (makes) b_all = factors.room(contracted(group, group.count), all);
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    if (makes) {  // the B_i on the diagonal
      factors.put(b_all, contracted(group, i), round_up(member.n, kPairStep), columns(group, i),
                  member.b, member.n, member.r);
    } else if (passes) {
      b[i] = factors.take(member.b, member.n, member.r, false);
    }
  }
  Order order = factors.launch(place.stream);

  for (int i = 0; i < group.count && passes; ++i) {
    const Member& member = group.members[i];
    SkinnyArgs dz = skinny(group, member.dy, member.pitch_dy, member.n);
    dz.scale = group.scale;
    dz.u = b[i].data;
    dz.pitch_u = b[i].pitch;
    dz.p = advance(group.dz, columns(group, i), group.dtype);
    dz.pitch_p = all;
    dz.partials = partials;
    by_rank({dz, order}, member.r, sm_count, place.stream);
    order = Order::kAfter;
  }
  std::string_view name;
  if (group.dx != nullptr) {
    GemmArgs gemm;
    gemm.dtype = group.dtype;
    gemm.by_out = false;
    gemm.z = group.dz, gemm.pitch_z = all;
    gemm.b = a.data, gemm.pitch_b = a.pitch;
    gemm.y = group.dx, gemm.pitch_y = group.k;
    gemm.m = static_cast<int>(group.m), gemm.n = static_cast<int>(group.k);
    gemm.r = static_cast<int>(all);
    for (int i = 0; i < group.count; ++i) {
      const Member& member = group.members[i];
      const Pair pair{member.dy, member.w, member.pitch_dy, member.pitch_w,
                      static_cast<int>(member.n)};
      if (i > 0) {
        gemm.more[i - 1] = pair;
      } else {
        gemm.x = pair.x, gemm.pitch_x = pair.pitch_x;
        gemm.w = pair.w, gemm.pitch_w = pair.pitch_w;
        gemm.k = pair.k;
      }
    }
    if (makes) {
      gemm.making = {b_all.data,  b_all.pitch, static_cast<int>(all), group.dz,
                     group.scale, partials,    group.counters};
    }
    name = launch_product(gemm, making, place);
    order = Order::kBeside;  // on SMs that the GEMM leaves free
  } else if (order == Order::kAfter) {
    order = Order::kAlone;
  }
  Order order_da = makes && making.columns == group.k ? Order::kAfter : order;
  for (int i = 0; i < group.count; ++i) {
    const Member& member = group.members[i];
    auto* db_partials = static_cast<float*>(arena.take(partials_db(group, i, sm_count)));
    if (member.db == nullptr) continue;
    SkinnyArgs db = skinny(group, member.dy, member.pitch_dy, member.n);
    db.counters += kCountersDb * (1 + i);
    db.partials = db_partials;
    db.v = advance(group.z, member.first, group.dtype);
    db.pitch_v = group.pitch_z;
    db.q = member.db;
    db.pitch_q = member.r;
    db.dtype_q = group.adapter_dtype;
    db.accumulate = member.add_db;
    by_rank({db, order}, member.r, sm_count, place.stream);
    // Several launches of one dB follow one another, and what comes after them follows the last.
    if (member.r > kSkinnyRank) order = order_da = Order::kAlone;
  }
  if (want_da) launch_da(group, da_partials, order_da, sm_count, place.stream);
  return name;
}

}  // namespace pyfast::lora

#endif
