// SPDX-License-Identifier: Apache-2.0
// The one place that chooses an NF4 kernel.
#include "common/launch.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {

// Units are blocks, and groups of 256 of them for nest.
static Split by_blocks(std::int64_t numel, int blocksize) {
  constexpr std::int64_t kGrain = 32768;  // elements
  return {ceil_div(numel, blocksize), ceil_div(kGrain, blocksize)};
}

static Split split(const QuantizeParams& params) {
  return by_blocks(params.numel, params.blocksize);
}

static Split split(const DequantizeParams& params) {
  return by_blocks(params.numel, params.blocksize);
}

static Split split(const NestParams& params) {
  return {ceil_div(params.num_blocks, kNestedBlocksize), 16};
}

namespace {

constexpr Variant<QuantizeParams> kQuantize[] = {
#ifdef PYFAST_CUDA
    {"nf4_quantize_cuda", Isa::scalar, 80, on_cuda<launch_quantize, QuantizeParams>},
#endif
#ifdef PYFAST_X86
    {"nf4_quantize_avx512", Isa::avx512, 0, on_cpu<quantize_avx512, QuantizeParams>},
    {"nf4_quantize_avx2", Isa::avx2, 0, on_cpu<quantize_avx2, QuantizeParams>},
#endif
    {"nf4_quantize_scalar", Isa::scalar, 0, on_cpu<quantize_scalar, QuantizeParams>},
};

constexpr Variant<NestParams> kNest[] = {
#ifdef PYFAST_CUDA
    {"nf4_nest_cuda", Isa::scalar, 80, on_cuda<launch_nest, NestParams>},
#endif
    {"nf4_nest_scalar", Isa::scalar, 0, on_cpu<nest_scalar, NestParams>},
};

constexpr Variant<DequantizeParams> kDequantize[] = {
#ifdef PYFAST_CUDA
    {"nf4_dequantize_cuda", Isa::scalar, 80, on_cuda<launch_dequantize, DequantizeParams>},
#endif
#ifdef PYFAST_X86
    {"nf4_dequantize_avx512", Isa::avx512, 0, on_cpu<dequantize_avx512, DequantizeParams>},
    {"nf4_dequantize_avx2", Isa::avx2, 0, on_cpu<dequantize_avx2, DequantizeParams>},
#endif
    {"nf4_dequantize_scalar", Isa::scalar, 0, on_cpu<dequantize_scalar, DequantizeParams>},
};

void check_common(std::string_view op, int blocksize, DType dtype) {
  PYFAST_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
               ": blocksize must be a power of two from 32 to 4096, got ", blocksize);
  check_dtype(op, dtype);
}

}  // namespace

std::string_view quantize(const QuantizeParams& params, const Placement& place,
                          std::string_view variant) {
  constexpr std::string_view kOp = "nf4_quantize";
  check_common(kOp, params.blocksize, params.dtype);
  PYFAST_CHECK(params.numel >= 0, kOp, ": numel must not be negative, got ", params.numel);
  if (params.numel > 0) {
    check_pointer(kOp, "src", params.src);
    check_pointer(kOp, "packed", params.packed);
    check_pointer(kOp, "absmax", params.absmax);
  }
  return dispatch<QuantizeParams>(kOp, kQuantize, params, place, variant);
}

std::string_view nest(const NestParams& params, const Placement& place, std::string_view variant) {
  constexpr std::string_view kOp = "nf4_nest";
  PYFAST_CHECK(params.num_blocks >= 0, kOp, ": num_blocks must not be negative, got ",
               params.num_blocks);
  if (params.num_blocks > 0) {
    check_pointer(kOp, "absmax", params.absmax);
    check_pointer(kOp, "offset", params.offset);
    check_pointer(kOp, "codes", params.codes);
    check_pointer(kOp, "nested_absmax", params.nested_absmax);
  }
  return dispatch<NestParams>(kOp, kNest, params, place, variant);
}

std::string_view dequantize(const DequantizeParams& params, const Placement& place,
                            std::string_view variant) {
  constexpr std::string_view kOp = "nf4_dequantize";
  check_common(kOp, params.blocksize, params.dtype);
  PYFAST_CHECK(params.numel >= 0, kOp, ": numel must not be negative, got ", params.numel);
  PYFAST_CHECK(params.first_block >= 0, kOp, ": first_block must not be negative, got ",
               params.first_block);
  PYFAST_CHECK((params.nested_absmax == nullptr) == (params.offset == nullptr), kOp,
               ": nested_absmax and offset belong together; one of them is null");
  if (params.numel > 0) {
    check_pointer(kOp, "packed", params.packed);
    check_pointer(kOp, "absmax", params.absmax);
    check_pointer(kOp, "out", params.out);
  }
  return dispatch<DequantizeParams>(kOp, kDequantize, params, place, variant);
}

std::vector<VariantInfo> variants(std::string_view op) {
  if (op == "nf4_quantize") return describe<QuantizeParams>(kQuantize);
  if (op == "nf4_nest") return describe<NestParams>(kNest);
  if (op == "nf4_dequantize") return describe<DequantizeParams>(kDequantize);
  return {};
}

}  // namespace pyfast::nf4
