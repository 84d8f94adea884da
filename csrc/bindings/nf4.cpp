// SPDX-License-Identifier: Apache-2.0
#include "nf4/nf4.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace pyfast {
namespace {

std::string_view quantize(int device, std::uintptr_t src, int dtype, std::int64_t numel,
                          int blocksize, std::uintptr_t packed, std::uintptr_t absmax, int threads,
                          std::uintptr_t stream, const std::string& variant) {
  return nf4::quantize({.src = pointer<const void>(src),
                        .dtype = static_cast<DType>(dtype),
                        .numel = numel,
                        .blocksize = blocksize,
                        .packed = pointer<std::uint8_t>(packed),
                        .absmax = pointer<float>(absmax)},
                       {device, threads, pointer<void>(stream)}, variant);
}

std::string_view nest(int device, std::uintptr_t absmax, std::int64_t num_blocks,
                      std::uintptr_t offset, std::uintptr_t codes, std::uintptr_t nested_absmax,
                      int threads, std::uintptr_t stream, const std::string& variant) {
  return nf4::nest({.absmax = pointer<const float>(absmax),
                    .num_blocks = num_blocks,
                    .offset = pointer<const float>(offset),
                    .codes = pointer<std::uint8_t>(codes),
                    .nested_absmax = pointer<float>(nested_absmax)},
                   {device, threads, pointer<void>(stream)}, variant);
}

std::string_view dequantize(int device, std::uintptr_t packed, std::uintptr_t absmax,
                            std::uintptr_t nested_absmax, std::uintptr_t offset, std::uintptr_t out,
                            int dtype, std::int64_t first_block, std::int64_t numel, int blocksize,
                            int threads, std::uintptr_t stream, const std::string& variant) {
  return nf4::dequantize({.packed = pointer<const std::uint8_t>(packed),
                          .absmax = pointer<const void>(absmax),
                          .nested_absmax = pointer<const float>(nested_absmax),
                          .offset = pointer<const float>(offset),
                          .out = pointer<void>(out),
                          .dtype = static_cast<DType>(dtype),
                          .first_block = first_block,
                          .numel = numel,
                          .blocksize = blocksize},
                         {device, threads, pointer<void>(stream)}, variant);
}

std::string_view few_rows(int device, std::uintptr_t x, std::int64_t pitch_x, std::uintptr_t packed,
                          std::uintptr_t absmax, std::uintptr_t nested_absmax,
                          std::uintptr_t offset, std::uintptr_t bias, std::uintptr_t y,
                          std::int64_t pitch_y, int m, int n, int k, int dtype, int blocksize,
                          bool early, int threads, std::uintptr_t stream,
                          const std::string& variant) {
  return nf4::few_rows({.x = pointer<const void>(x),
                        .packed = pointer<const std::uint8_t>(packed),
                        .absmax = pointer<const void>(absmax),
                        .nested_absmax = pointer<const float>(nested_absmax),
                        .offset = pointer<const float>(offset),
                        .bias = pointer<const void>(bias),
                        .y = pointer<void>(y),
                        .pitch_x = pitch_x,
                        .pitch_y = pitch_y,
                        .m = m,
                        .n = n,
                        .k = k,
                        .dtype = static_cast<DType>(dtype),
                        .blocksize = blocksize,
                        .early = early},
                       {device, threads, pointer<void>(stream)}, variant);
}

std::string_view gemm(int device, std::uintptr_t x, std::int64_t pitch_x, std::uintptr_t packed,
                      std::uintptr_t absmax, std::uintptr_t nested_absmax, std::uintptr_t offset,
                      std::uintptr_t z, std::int64_t pitch_z, std::uintptr_t b,
                      std::int64_t pitch_b, std::uintptr_t bias, std::uintptr_t y,
                      std::int64_t pitch_y, int m, int n, int k, int r, bool by_out, int dtype,
                      int blocksize, int threads, std::uintptr_t stream, std::string_view variant) {
  return nf4::gemm({.x = pointer<const void>(x),
                    .packed = pointer<const std::uint8_t>(packed),
                    .absmax = pointer<const void>(absmax),
                    .nested_absmax = pointer<const float>(nested_absmax),
                    .offset = pointer<const float>(offset),
                    .z = pointer<const void>(z),
                    .b = pointer<const void>(b),
                    .bias = pointer<const void>(bias),
                    .y = pointer<void>(y),
                    .pitch_x = pitch_x,
                    .pitch_z = pitch_z,
                    .pitch_b = pitch_b,
                    .pitch_y = pitch_y,
                    .m = m,
                    .n = n,
                    .k = k,
                    .r = r,
                    .by_out = by_out,
                    .dtype = static_cast<DType>(dtype),
                    .blocksize = blocksize},
                   {device, threads, pointer<void>(stream)}, variant);
}

}  // namespace

void bind_nf4(py::module_& m) {
  m.def("nf4_quantize", &quantize, Unlocked(), py::kw_only(), py::arg("device"), py::arg("src"),
        py::arg("dtype"), py::arg("numel"), py::arg("blocksize"), py::arg("packed"),
        py::arg("absmax"), py::arg("threads"), py::arg("stream"), py::arg("variant") = "",
        "Quantise src[numel] to NF4 bytes and block scales. Returns the kernel's name.");
  m.def("nf4_nest", &nest, Unlocked(), py::kw_only(), py::arg("device"), py::arg("absmax"),
        py::arg("num_blocks"), py::arg("offset"), py::arg("codes"), py::arg("nested_absmax"),
        py::arg("threads"), py::arg("stream"), py::arg("variant") = "",
        "Quantise absmax[num_blocks] - offset[0] to 8-bit codes. Returns the kernel's name.");
  m.def("nf4_dequantize", &dequantize, Unlocked(), py::kw_only(), py::arg("device"),
        py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"), py::arg("offset"),
        py::arg("out"), py::arg("dtype"), py::arg("first_block"), py::arg("numel"),
        py::arg("blocksize"), py::arg("threads"), py::arg("stream"), py::arg("variant") = "",
        "Write numel elements from block first_block on to out. Returns the kernel's name.");
  m.def("nf4_few_rows", &few_rows, Unlocked(), py::kw_only(), py::arg("device"), py::arg("x"),
        py::arg("pitch_x"), py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"),
        py::arg("offset"), py::arg("bias"), py::arg("y"), py::arg("pitch_y"), py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("blocksize"), py::arg("early"),
        py::arg("threads"), py::arg("stream"), py::arg("variant") = "",
        "y[m, n] = x[m, k] W^T + bias from the packed W [n, k]. Returns the kernel's name.");
  m.def("nf4_gemm", &gemm, Unlocked(), py::kw_only(), py::arg("device"), py::arg("x"),
        py::arg("pitch_x"), py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"),
        py::arg("offset"), py::arg("z"), py::arg("pitch_z"), py::arg("b"), py::arg("pitch_b"),
        py::arg("bias"), py::arg("y"), py::arg("pitch_y"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("r"), py::arg("by_out"), py::arg("dtype"), py::arg("blocksize"), py::arg("threads"),
        py::arg("stream"), py::arg("variant") = "",
        "y[m, n] = x[m, k] W^T + z[m, r] B^T + bias from the packed W. Returns the kernel's name.");
}

}  // namespace pyfast
