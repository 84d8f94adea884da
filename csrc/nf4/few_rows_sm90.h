// SPDX-License-Identifier: Apache-2.0
// Host side of the few-row kernels of sm_90: tensor maps and launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "nf4/nf4.h"

namespace pyfast::nf4::few {

constexpr const char* kFewRowsOp = "nf4_few_rows";

// The driver's function, found at run time: the extension does not link libcuda.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    CUDA_CHECK(kFewRowsOp, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                            cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(concat(kFewRowsOp, ": the driver has no cuTensorMapEncodeTiled"));
    }
    return reinterpret_cast<Encode>(found);
  }();
  return encode;
}

// Rows of 128 bytes in shared memory, swizzled; what lies outside of the tensor reads as zero.
template <int kRank>
CUtensorMap encode_map(CUtensorMapDataType type, const void* base,
                       const std::uint64_t (&sizes)[kRank],
                       const std::uint64_t (&pitches)[kRank - 1],
                       const std::uint32_t (&box)[kRank]) {
  cuuint64_t dims[kRank], strides[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) dims[i] = sizes[i], boxes[i] = box[i], steps[i] = 1;
  for (int i = 0; i + 1 < kRank; ++i) strides[i] = pitches[i];
  CUtensorMap map;
  const CUresult status =
      tensor_map_encoder()(&map, type, kRank, const_cast<void*>(base), dims, strides, boxes, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(
        concat(kFewRowsOp, ": cuTensorMapEncodeTiled failed with ", static_cast<int>(status)));
  }
  return map;
}

// Tiles of W: `rows` rows of 256 columns.
inline CUtensorMap map_of_w(const FewRowsParams& params, int rows) {
  const auto pitch = static_cast<std::uint64_t>(params.k / 2);
  return encode_map<2>(CU_TENSOR_MAP_DATA_TYPE_UINT8, params.packed,
                       {pitch, static_cast<std::uint64_t>(params.n)}, {pitch},
                       {128, static_cast<std::uint32_t>(rows)});
}

// Boxes of x: `blocks` blocks of 64 columns, of each `tokens` rows.
inline CUtensorMap map_of_x(const FewRowsParams& params, int tokens, int blocks) {
  return encode_map<3>(
      CU_TENSOR_MAP_DATA_TYPE_UINT16, params.x,
      {64, static_cast<std::uint64_t>(params.m), static_cast<std::uint64_t>(params.k / 64)},
      {static_cast<std::uint64_t>(params.pitch_x) * 2, 128},
      {64, static_cast<std::uint32_t>(tokens), static_cast<std::uint32_t>(blocks)});
}

struct Grid {
  int blocks = 0, threads = 0, shared_bytes = 0;
  int cluster = 1;  // blocks of one
};

// Launched early, the kernels wait for the grid ahead of them before they read x.
template <auto kKernel, class... Args>
void launch_grid(const Grid& grid, bool early, void* stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  CUDA_CHECK(kFewRowsOp, cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace pyfast::nf4::few
