// SPDX-License-Identifier: Apache-2.0
// The one place that chooses an NF4 kernel.
#include <span>

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

// Why a device other than Hopper cannot run what is compiled for Hopper alone.
std::string reason_unless_90([[maybe_unused]] const Placement& place) {
#ifdef PYFAST_CUDA
  if (const int sm = cuda_device(place.device).sm; sm != 90) {
    return concat("it needs compute capability 9.0, device ", place.device, " has ", sm / 10, ".",
                  sm % 10);
  }
#endif
  return {};
}

// A kernel of the few-row product and what it takes; first match wins.
struct FewRowsKernel {
  Variant<FewRowsParams> variant;
  int most_rows;
  bool only_90;

  std::string reason_at(const FewRowsParams& params, const Placement& place) const {
    if (std::string reason = variant.reason_at(place); !reason.empty()) return reason;
    if (params.m > most_rows) return concat("it takes up to ", most_rows, " rows, got ", params.m);
    if (only_90) return reason_unless_90(place);
    return {};
  }
};

std::span<const FewRowsKernel> few_rows_kernels() {
#ifdef PYFAST_CUDA
  static constexpr FewRowsKernel kKernels[] = {
#ifdef PYFAST_SM90
      {{"nf4_few_rows_mma_sm90", Isa::scalar, 90, on_cuda<launch_few_rows_mma_sm90, FewRowsParams>},
       kMostRowsMma,
       true},
      {{"nf4_few_rows_wgmma_sm90", Isa::scalar, 90,
        on_cuda<launch_few_rows_wgmma_sm90, FewRowsParams>},
       kMostRowsWgmma,
       true},
#endif
      {{"nf4_few_rows_mma_sm80", Isa::scalar, 80, on_cuda<launch_few_rows_mma_sm80, FewRowsParams>},
       kMostRowsMma,
       false},
  };
  return kKernels;
#else
  return {};
#endif
}

// Where none is named the first serves.
constexpr std::string_view kNarrowGemm = "nf4_gemm_sm90_narrow";
#ifdef PYFAST_SM90
template <int kColumns>
void launch_gemm(const GemmParams& params, const Placement& place) {
  (params.dtype == DType::bf16 ? launch_gemm_sm90_bf16 : launch_gemm_sm90_f16)(params, kColumns,
                                                                               place);
}
constexpr Variant<GemmParams> kGemm[] = {
    {"nf4_gemm_sm90", Isa::scalar, 90, on_cuda<launch_gemm<kGemmColumns>, GemmParams>},
    {kNarrowGemm, Isa::scalar, 90, on_cuda<launch_gemm<kGemmNarrowColumns>, GemmParams>},
};
#else
constexpr std::span<const Variant<GemmParams> > kGemm;
#endif

// What all products from the packed bytes ask for.
template <class Params>
void check_product(std::string_view op, const Params& params) {
  PYFAST_CHECK(params.dtype == DType::f16 || params.dtype == DType::bf16, op,
               ": dtype must be 1 (float16) or 2 (bfloat16), got ", static_cast<int>(params.dtype));
  PYFAST_CHECK(params.blocksize == 64, op, ": blocksize must be 64, got ", params.blocksize);
  PYFAST_CHECK((params.nested_absmax == nullptr) == (params.offset == nullptr), op,
               ": nested_absmax and offset belong together; one of them is null");
  check_pointer(op, "x", params.x);
  check_pointer(op, "packed", params.packed);
  check_pointer(op, "absmax", params.absmax);
  check_pointer(op, "y", params.y);
}

void check_gemm(std::string_view op, const GemmParams& params) {
  const auto fits = [](const void* pointer, std::int64_t pitch, std::int64_t columns) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && pitch % 8 == 0 &&
           pitch >= columns;
  };
  check_product(op, params);
  PYFAST_CHECK(params.m > 0 && params.n > 0 && params.k > 0 && params.r >= 0, op,
               ": m, n and k must be positive and r not negative, got ", params.m, ", ", params.n,
               ", ", params.k, " and ", params.r);
  PYFAST_CHECK(
      (params.by_out ? params.k : params.n) % 64 == 0 && params.n % 8 == 0 && params.k % 8 == 0, op,
      ": W's columns must be a multiple of 64, its rows of 8, got n ", params.n, " and k ",
      params.k);
  PYFAST_CHECK(fits(params.x, params.pitch_x, params.k) && fits(params.packed, 0, 0) &&
                   fits(params.y, params.pitch_y, params.n),
               op, ": x, packed and y must lie at multiples of 16 bytes, rows in multiples of 8");
  if (params.r == 0) return;
  check_pointer(op, "z", params.z);
  check_pointer(op, "b", params.b);
  PYFAST_CHECK(fits(params.z, params.pitch_z, params.r) &&
                   fits(params.b, params.pitch_b, params.by_out ? params.r : params.n),
               op, ": z and b must lie at multiples of 16 bytes, rows in multiples of 8");
}

void check_few_rows(std::string_view op, const FewRowsParams& params) {
  const auto aligned = [](const void* pointer, std::uintptr_t to) {
    return reinterpret_cast<std::uintptr_t>(pointer) % to == 0;
  };
  check_product(op, params);
  PYFAST_CHECK(params.m > 0 && params.n > 0 && params.k > 0, op,
               ": m, n and k must be positive, got ", params.m, ", ", params.n, " and ", params.k);
  PYFAST_CHECK(params.k % 64 == 0, op, ": k must be a multiple of 64, got ", params.k);
  PYFAST_CHECK(params.pitch_x >= params.k && params.pitch_x % 8 == 0, op,
               ": pitch_x must be a multiple of 8 and at least ", params.k, ", got ",
               params.pitch_x);
  PYFAST_CHECK(aligned(params.x, 16) && aligned(params.packed, 16), op,
               ": x and packed must lie at multiples of 16 bytes");
  PYFAST_CHECK(aligned(params.absmax, params.offset == nullptr ? 16 : 4), op,
               ": absmax must lie at a multiple of 16 bytes, or 4 if it is nested");
}

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

std::string_view few_rows(const FewRowsParams& params, const Placement& place,
                          std::string_view variant) {
  constexpr std::string_view kOp = "nf4_few_rows";
  check_few_rows(kOp, params);
  std::string reasons;
  for (const FewRowsKernel& kernel : few_rows_kernels()) {
    if (!variant.empty() && kernel.variant.name != variant) continue;
    if (const std::string reason = kernel.reason_at(params, place); !reason.empty()) {
      reasons += concat(reasons.empty() ? "" : "; ", kernel.variant.name, ": ", reason);
      continue;
    }
    kernel.variant.launch(params, place);
    return kernel.variant.name;
  }
  PYFAST_CHECK(variant.empty() || !reasons.empty(), kOp, ": this build has no variant \"", variant,
               "\"; variants(\"", kOp, "\") lists them");
  throw std::invalid_argument(concat(kOp, ": no kernel can run here (",
                                     reasons.empty() ? "this build has none" : reasons, ")"));
}

std::string_view gemm(const GemmParams& params, const Placement& place, std::string_view variant) {
  check_gemm("nf4_gemm", params);
  std::string reason = variant.empty() ? "this build has none"
                                       : concat("this build has no variant \"", variant, "\"");
  for (const Variant<GemmParams>& kernel : kGemm) {
    if (!variant.empty() && kernel.name != variant) continue;
    reason = kernel.reason_at(place);
    if (reason.empty()) reason = reason_unless_90(place);
    if (reason.empty() && kernel.name == kNarrowGemm && !params.by_out) {
      reason = "tiles of few columns are for W by out feature";
    }
    if (!reason.empty()) continue;
    kernel.launch(params, place);
    return kernel.name;
  }
  throw std::invalid_argument(concat("nf4_gemm: no kernel can run here (", reason, ")"));
}

std::vector<VariantInfo> variants(std::string_view op) {
  if (op == "nf4_quantize") return describe<QuantizeParams>(kQuantize);
  if (op == "nf4_nest") return describe<NestParams>(kNest);
  if (op == "nf4_dequantize") return describe<DequantizeParams>(kDequantize);
  if (op == "nf4_gemm") {
    auto rows = describe<GemmParams>(kGemm);
    if (rows.empty())
      rows.push_back({"nf4_gemm_sm90", true, "this build has no kernels for Hopper"});
    return rows;
  }
  if (op == "nf4_few_rows") {
    std::vector<VariantInfo> rows;
    for (const FewRowsKernel& kernel : few_rows_kernels()) {
      rows.push_back({kernel.variant.name, true, kernel.variant.reason()});
    }
    if (rows.empty())
      rows.push_back({"nf4_few_rows_mma_sm90", true, "this build has no CUDA kernels"});
    return rows;
  }
  return {};
}

}  // namespace pyfast::nf4
