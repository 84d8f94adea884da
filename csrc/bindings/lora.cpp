// SPDX-License-Identifier: Apache-2.0
#include "lora/lora.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "common/check.h"
#include "lora/group.h"

namespace py = pybind11;

namespace pyfast {

#ifdef PYFAST_CUDA
namespace {

using Address = std::uintptr_t;

lora::Problem problem(int dtype, int adapter_dtype, std::int64_t m, std::int64_t n, std::int64_t k,
                      std::int64_t r, Address x, std::int64_t pitch_x, Address w,
                      std::int64_t pitch_w, bool by_out, Address a, Address b, float scale,
                      std::int64_t pitch_z, Address seed, std::uint32_t threshold,
                      Address workspace, Address counters) {
  return {.dtype = static_cast<DType>(dtype),
          .adapter_dtype = static_cast<DType>(adapter_dtype),
          .m = m,
          .n = n,
          .k = k,
          .r = r,
          .x = pointer<const void>(x),
          .pitch_x = pitch_x,
          .w = pointer<const void>(w),
          .pitch_w = pitch_w,
          .by_out = by_out,
          .a = pointer<const void>(a),
          .b = pointer<const void>(b),
          .scale = scale,
          .pitch_z = pitch_z,
          .seed = pointer<const std::int64_t>(seed),
          .threshold = threshold,
          .workspace = pointer<void>(workspace),
          .counters = pointer<unsigned>(counters)};
}

std::string_view forward(int device, Address stream, int dtype, int adapter_dtype, std::int64_t m,
                         std::int64_t n, std::int64_t k, std::int64_t r, Address x,
                         std::int64_t pitch_x, Address w, std::int64_t pitch_w, bool by_out,
                         Address a, Address b, float scale, std::int64_t pitch_z, Address seed,
                         std::uint32_t threshold, Address workspace, Address counters, Address bias,
                         Address columns, Address y, Address z) {
  lora::Forward params{problem(dtype, adapter_dtype, m, n, k, r, x, pitch_x, w, pitch_w, by_out, a,
                               b, scale, pitch_z, seed, threshold, workspace, counters)};
  params.bias = pointer<const void>(bias);
  params.columns = pointer<const float>(columns);
  params.y = pointer<void>(y);
  params.z = pointer<void>(z);
  return lora::forward(params, {device, 1, pointer<void>(stream)});
}

std::string_view backward(int device, Address stream, int dtype, int adapter_dtype, std::int64_t m,
                          std::int64_t n, std::int64_t k, std::int64_t r, Address x,
                          std::int64_t pitch_x, Address w, std::int64_t pitch_w, bool by_out,
                          Address a, Address b, float scale, std::int64_t pitch_z, Address seed,
                          std::uint32_t threshold, Address workspace, Address counters, Address dy,
                          std::int64_t pitch_dy, Address z, Address dz, Address dx, Address da,
                          Address db, bool add_da, bool add_db) {
  lora::Backward params{problem(dtype, adapter_dtype, m, n, k, r, x, pitch_x, w, pitch_w, by_out, a,
                                b, scale, pitch_z, seed, threshold, workspace, counters)};
  params.dy = pointer<const void>(dy);
  params.pitch_dy = pitch_dy;
  params.z = pointer<const void>(z);
  params.dz = pointer<void>(dz);
  params.dx = pointer<void>(dx);
  params.da = pointer<void>(da);
  params.db = pointer<void>(db);
  params.add_da = add_da;
  params.add_db = add_db;
  return lora::backward(params, {device, 1, pointer<void>(stream)});
}

lora::Problem shape(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t r) {
  lora::Problem problem;
  problem.m = m, problem.n = n, problem.k = k, problem.r = r;
  return problem;
}

// n, r, the first column of z, w and its pitch, a, b; then bias, y, or dy and its pitch, da, db and
// whether they are added to what is there.
using Member = std::array<Address, 13>;

lora::Group group(int dtype, int adapter_dtype, std::int64_t m, std::int64_t k, Address x,
                  std::int64_t pitch_x, float scale, Address z, std::int64_t pitch_z, bool given,
                  Address workspace, Address counters, const std::vector<Member>& members) {
  lora::Group group;
  group.given = given;
  group.dtype = static_cast<DType>(dtype);
  group.adapter_dtype = static_cast<DType>(adapter_dtype);
  group.m = m;
  group.k = k;
  group.x = pointer<const void>(x);
  group.pitch_x = pitch_x;
  group.scale = scale;
  group.z = pointer<void>(z);
  group.pitch_z = pitch_z;
  group.workspace = pointer<void>(workspace);
  group.counters = pointer<unsigned>(counters);
  for (const Member& from : members) {
    PYFAST_CHECK(group.count < lora::kMembers, "lora_group: at most ", lora::kMembers, " members");
    lora::Member& to = group.members[group.count++];
    const auto size = [&](int i) { return static_cast<std::int64_t>(from[i]); };
    to.n = size(0), to.r = size(1), to.first = size(2);
    to.w = pointer<const void>(from[3]), to.pitch_w = size(4);
    to.a = pointer<const void>(from[5]), to.b = pointer<const void>(from[6]);
    to.bias = to.dy = pointer<const void>(from[7]);
    to.pitch_dy = size(8);
    to.y = to.da = pointer<void>(from[9]);
    to.db = pointer<void>(from[10]);
    to.add_da = from[11] != 0, to.add_db = from[12] != 0;
  }
  return group;
}

std::string_view group_forward(int device, Address stream, int dtype, int adapter_dtype,
                               std::int64_t m, std::int64_t k, Address x, std::int64_t pitch_x,
                               float scale, Address z, std::int64_t pitch_z, bool given,
                               Address workspace, Address counters,
                               const std::vector<Member>& members) {
  return lora::group_forward(group(dtype, adapter_dtype, m, k, x, pitch_x, scale, z, pitch_z, given,
                                   workspace, counters, members),
                             {device, 1, pointer<void>(stream)});
}

std::string_view group_backward(int device, Address stream, int dtype, int adapter_dtype,
                                std::int64_t m, std::int64_t k, Address x, std::int64_t pitch_x,
                                float scale, Address z, std::int64_t pitch_z, bool given,
                                Address workspace, Address counters,
                                const std::vector<Member>& members, Address dz, Address dx) {
  lora::Group all = group(dtype, adapter_dtype, m, k, x, pitch_x, scale, z, pitch_z, given,
                          workspace, counters, members);
  all.dz = pointer<void>(dz);
  all.dx = pointer<void>(dx);
  return lora::group_backward(all, {device, 1, pointer<void>(stream)});
}

// Members by n, r and the weight's pitch.
lora::Group group_shape(std::int64_t m, std::int64_t k,
                        const std::vector<std::array<std::int64_t, 3>>& members) {
  lora::Group group;
  group.m = m, group.k = k;
  for (const auto& [n, r, pitch_w] : members) {
    PYFAST_CHECK(group.count < lora::kMembers, "lora_group: at most ", lora::kMembers, " members");
    lora::Member& to = group.members[group.count++];
    to.n = n, to.r = r, to.pitch_w = pitch_w;
  }
  return group;
}

std::pair<std::string, std::string> gemm_name(int device, std::int64_t m, std::int64_t n,
                                              std::int64_t k, std::int64_t pitch_w, bool by_out,
                                              bool transposed) {
  lora::Problem asked = shape(m, n, k, 0);
  asked.pitch_w = pitch_w;
  asked.by_out = by_out;
  std::string reason;
  const std::string_view name = lora::gemm_name(asked, transposed, device, &reason);
  return {std::string(name), reason};
}

void gemm(int device, Address stream, int dtype, bool by_out, std::int64_t m, std::int64_t n,
          std::int64_t k, std::int64_t r, Address x, Address w, Address z, Address b,
          std::int64_t pitch_r, Address bias, Address y, int kernel, int swizzle, bool along_n,
          int blocks, Address q, Address workspace, Address counters) {
  lora::GemmArgs args{.dtype = static_cast<DType>(dtype),
                      .by_out = by_out,
                      .x = pointer<const void>(x),
                      .w = pointer<const void>(w),
                      .z = pointer<void>(z),
                      .b = pointer<const void>(b),
                      .bias = pointer<const void>(bias),
                      .y = pointer<void>(y),
                      .pitch_x = k,
                      .pitch_w = by_out ? k : n,
                      .pitch_z = pitch_r,
                      .pitch_b = by_out ? pitch_r : n,
                      .pitch_y = n,
                      .m = static_cast<int>(m),
                      .n = static_cast<int>(n),
                      .k = static_cast<int>(k),
                      .r = static_cast<int>(r),
                      .more = {},
                      .mask = {},
                      .making = {.q = pointer<const void>(q),
                                 .pitch_q = by_out ? k : pitch_r,
                                 .r = static_cast<int>(r),
                                 .z = pointer<void>(z),
                                 .partials = pointer<float>(workspace),
                                 .counters = pointer<unsigned>(counters)},
                      .side = {}};
  lora::gemm(args, {kernel, swizzle, along_n, blocks}, {device, 1, pointer<void>(stream)});
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("lora_forward", &forward, Unlocked(), "Enqueue z and, unless w is 0, y.");
  m.def("lora_backward", &backward, Unlocked(), "Enqueue the gradients whose pointer is not 0.");
  m.def(
      "lora_workspace",
      [](int device, std::int64_t rows, std::int64_t n, std::int64_t k, std::int64_t r) {
        return lora::workspace(shape(rows, n, k, r), device);
      },
      "Bytes of workspace that both directions need.");
  m.def("lora_group_forward", &group_forward, Unlocked(), "Enqueue z and all y.");
  m.def("lora_group_backward", &group_backward, Unlocked(),
        "Enqueue the gradients whose pointer is not 0, of the members that have a dy.");
  m.def(
      "lora_group_workspace",
      [](int device, std::int64_t rows, std::int64_t k,
         const std::vector<std::array<std::int64_t, 3>>& members) {
        return lora::group_workspace(group_shape(rows, k, members), device);
      },
      "Bytes of workspace that both directions of a group need.");
  m.def(
      "lora_group_gemm_name",
      [](int device, std::int64_t rows, std::int64_t k,
         const std::vector<std::array<std::int64_t, 3>>& members, bool transposed) {
        std::string reason;
        const std::string_view name =
            lora::group_gemm_name(group_shape(rows, k, members), transposed, device, &reason);
        return std::pair(std::string(name), reason);
      },
      "The GEMM kernel of a group, or an empty name and why.");
  m.def(
      "lora_group_makes",
      [](int device, std::int64_t rows, std::int64_t k,
         const std::vector<std::array<std::int64_t, 3>>& members, bool transposed) {
        return lora::group_makes(group_shape(rows, k, members), transposed, device);
      },
      "Whether the GEMM of a group makes Z, or all dz, itself.");
  m.def(
      "lora_makes",
      [](int device, std::int64_t rows, std::int64_t n, std::int64_t k, std::int64_t r,
         bool transposed) { return lora::makes(shape(rows, n, k, r), transposed, device); },
      "Whether the GEMM of a direction makes z or dz itself, without dropout.");
  m.def(
      "lora_dx_over_x",
      [](int device, std::int64_t rows, std::int64_t n, std::int64_t k, std::int64_t r) {
        return lora::dx_over_x(shape(rows, n, k, r), device);
      },
      "Whether dx may take the place of x while a GEMM may make dz.");
  m.def("lora_gemm_name", &gemm_name, "The GEMM kernel for a shape, or an empty name and why.");
  m.def("lora_gemm", &gemm, Unlocked(), "One GEMM with a given plan; for measuring.");
  m.def("lora_allow_making", &lora::allow_making,
        "Whether GEMMs may make their low-rank operand, which takes all of their SMs at once.");
  m.def("lora_force_sm", &lora::force_gemm_sm,
        "For tests: 80 has the kernels for sm_80 serve on any device, 0 ends that.");
  m.def("lora_gemm_kernels", [] {
    py::list names;
    for (const std::string_view name : lora::kGemmNames) names.append(name);
    return names;
  });
  m.attr("lora_counters") = lora::kCounters;
}

#else

void bind_lora(py::module_&) {}

#endif

}  // namespace pyfast
