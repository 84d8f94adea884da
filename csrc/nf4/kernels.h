// SPDX-License-Identifier: Apache-2.0
// The kernels that dispatch.cpp chooses from. CPU kernels do a range of blocks on the calling
// thread; CUDA launchers enqueue the whole tensor on the current device.
#pragma once

#include "nf4/nf4.h"

namespace pyfast::nf4 {

// Blocks [begin, end) of the tensor.
void quantize_scalar(const QuantizeParams& params, std::int64_t begin, std::int64_t end);
void quantize_avx2(const QuantizeParams& params, std::int64_t begin, std::int64_t end);
void quantize_avx512(const QuantizeParams& params, std::int64_t begin, std::int64_t end);

// Groups [begin, end) of 256 blocks.
void nest_scalar(const NestParams& params, std::int64_t begin, std::int64_t end);

// Blocks [begin, end) of the requested part, counted from params.first_block.
void dequantize_scalar(const DequantizeParams& params, std::int64_t begin, std::int64_t end);
void dequantize_avx2(const DequantizeParams& params, std::int64_t begin, std::int64_t end);
void dequantize_avx512(const DequantizeParams& params, std::int64_t begin, std::int64_t end);

void launch_quantize(const QuantizeParams& params, const Placement& place);
void launch_nest(const NestParams& params, const Placement& place);
void launch_dequantize(const DequantizeParams& params, const Placement& place);

// The rows of x that the kernels of the few-row product take.
constexpr int kMostRowsMma = 16, kMostRowsWgmma = 256;

// sm80: any GPU whose blocks may have the shared memory. sm90: compute capability 9.0 alone.
void launch_few_rows_mma_sm80(const FewRowsParams& params, const Placement& place);
void launch_few_rows_mma_sm90(const FewRowsParams& params, const Placement& place);
void launch_few_rows_wgmma_sm90(const FewRowsParams& params, const Placement& place);

inline constexpr const char* kGemmOp = "nf4_gemm";
// Columns of a tile; the narrow ones are for W by out feature.
constexpr int kGemmColumns = 128, kGemmNarrowColumns = 112;
void launch_gemm_sm90_bf16(const GemmParams& params, int columns, const Placement& place);
void launch_gemm_sm90_f16(const GemmParams& params, int columns, const Placement& place);

}  // namespace pyfast::nf4
