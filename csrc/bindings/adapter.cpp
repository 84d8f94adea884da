// SPDX-License-Identifier: Apache-2.0
#include "adapter/adapter.h"

#include "adapter/scale.h"
#include "adapter/scaled_gemm.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace pyfast {

#ifdef PYFAST_CUDA
namespace {

using Address = std::uintptr_t;

template <class Params>
Params params_of(int dtype, int activation, std::int64_t m, std::int64_t k, std::int64_t r,
                 Address x, std::int64_t pitch_x, Address down, Address up, Address norm_weight,
                 Address norm_bias, Address h, Address stats, Address workspace) {
  Params params;
  params.dtype = static_cast<DType>(dtype);
  params.activation = static_cast<adapter::Activation>(activation);
  params.m = m, params.k = k, params.r = r;
  params.x = pointer<const void>(x);
  params.pitch_x = pitch_x;
  params.down = pointer<const void>(down);
  params.up = pointer<const void>(up);
  params.norm_weight = pointer<const void>(norm_weight);
  params.norm_bias = pointer<const void>(norm_bias);
  params.h = pointer<void>(h);
  params.stats = pointer<float>(stats);
  params.workspace = pointer<void>(workspace);
  return params;
}

std::string_view forward(int device, Address stream, int dtype, int activation, std::int64_t m,
                         std::int64_t k, std::int64_t r, Address x, std::int64_t pitch_x,
                         Address down, Address up, Address norm_weight, Address norm_bias,
                         Address h, Address stats, Address workspace, float eps, Address down_bias,
                         Address up_bias, Address y) {
  auto params = params_of<adapter::Forward>(dtype, activation, m, k, r, x, pitch_x, down, up,
                                            norm_weight, norm_bias, h, stats, workspace);
  params.eps = eps;
  params.down_bias = pointer<const void>(down_bias);
  params.up_bias = pointer<const void>(up_bias);
  params.y = pointer<void>(y);
  return adapter::forward(params, {device, 1, pointer<void>(stream)});
}

std::string_view backward(int device, Address stream, int dtype, int activation, std::int64_t m,
                          std::int64_t k, std::int64_t r, Address x, std::int64_t pitch_x,
                          Address down, Address up, Address norm_weight, Address norm_bias,
                          Address h, Address stats, Address workspace, Address dy,
                          std::int64_t pitch_dy, Address active, Address dx, Address d_down,
                          Address d_up, Address d_down_bias, Address d_up_bias,
                          Address d_norm_weight, Address d_norm_bias) {
  auto params = params_of<adapter::Backward>(dtype, activation, m, k, r, x, pitch_x, down, up,
                                             norm_weight, norm_bias, h, stats, workspace);
  params.dy = pointer<const void>(dy);
  params.pitch_dy = pitch_dy;
  params.active = pointer<void>(active);
  params.dx = pointer<void>(dx);
  params.d_down = pointer<void>(d_down);
  params.d_up = pointer<void>(d_up);
  params.d_down_bias = pointer<void>(d_down_bias);
  params.d_up_bias = pointer<void>(d_up_bias);
  params.d_norm_weight = pointer<void>(d_norm_weight);
  params.d_norm_bias = pointer<void>(d_norm_bias);
  return adapter::backward(params, {device, 1, pointer<void>(stream)});
}

std::string_view scale_backward(int device, Address stream, int dtype, int scale_dtype,
                                std::int64_t rows, std::int64_t cols, Address dy,
                                std::int64_t pitch_dy, Address x, std::int64_t pitch_x,
                                Address scale, Address parts, Address dx, Address d_scale) {
  return adapter::scale_backward({.dtype = static_cast<DType>(dtype),
                                  .scale_dtype = static_cast<DType>(scale_dtype),
                                  .dy = pointer<const void>(dy),
                                  .pitch_dy = pitch_dy,
                                  .x = pointer<const void>(x),
                                  .pitch_x = pitch_x,
                                  .scale = pointer<const void>(scale),
                                  .dx = pointer<void>(dx),
                                  .d_scale = pointer<void>(d_scale),
                                  .parts = pointer<float>(parts),
                                  .rows = rows,
                                  .cols = cols},
                                 {device, 1, pointer<void>(stream)});
}

std::string_view scaled_gemm(int device, Address stream, int scale_dtype, std::int64_t m,
                             std::int64_t n, std::int64_t k, Address dy, std::int64_t pitch_dy,
                             Address w, std::int64_t pitch_w, Address x, std::int64_t pitch_x,
                             Address scale, Address parts, Address dx, Address d_scale) {
  return adapter::scaled_gemm({.dy = pointer<const void>(dy),
                               .pitch_dy = pitch_dy,
                               .w = pointer<const void>(w),
                               .pitch_w = pitch_w,
                               .x = pointer<const void>(x),
                               .pitch_x = pitch_x,
                               .scale = pointer<const float>(scale),
                               .dx = pointer<void>(dx),
                               .parts = pointer<float>(parts),
                               .d_scale = pointer<void>(d_scale),
                               .d_scale_dtype = static_cast<DType>(scale_dtype),
                               .m = m,
                               .n = n,
                               .k = k},
                              {device, 1, pointer<void>(stream)});
}

}  // namespace

void bind_adapter(py::module_& m) {
  m.def("adapter_forward", &forward, Unlocked(), "Enqueue h, y and, with a norm, the statistics.");
  m.def("adapter_backward", &backward, Unlocked(), "Enqueue the gradients whose pointer is not 0.");
  m.def(
      "adapter_workspace",
      [](int device, std::int64_t rows, std::int64_t k, std::int64_t r) {
        return adapter::workspace(rows, k, r, device);
      },
      "Bytes of workspace that both directions need.");
  m.def(
      "adapter_missing", [](int device, std::int64_t r) { return adapter::missing(r, device); },
      "Why a device cannot run the kernels; empty when it can.");
  m.def("adapter_scale_backward", &scale_backward, Unlocked(),
        "Enqueue the gradients whose pointer is not 0.");
  m.def(
      "adapter_scale_workspace",
      [](int device, std::int64_t rows, std::int64_t cols) {
        return adapter::scale_workspace(rows, cols, device);
      },
      "Bytes of partial sums that the gradient of the scale needs.");
  m.def("scaled_linear_backward", &scaled_gemm, Unlocked(),
        "Enqueue dx and, unless its pointer is 0, the gradient of the scale.");
  m.def(
      "scaled_linear_missing",
      [](int device, std::int64_t rows, std::int64_t n, std::int64_t k) {
        return adapter::scaled_gemm_missing(rows, n, k, device);
      },
      "Why torch serves a shape instead; empty where the GEMM does.");
  m.def("scaled_linear_workspace", &adapter::scaled_gemm_workspace,
        "Bytes of partial sums that the GEMM leaves.");
}

#else

void bind_adapter(py::module_&) {}

#endif

}  // namespace pyfast
