// SPDX-License-Identifier: Apache-2.0
#include "adapter/adapter.h"
#include "bindings/bindings.h"
#include "dora/dora.h"
#include "dropout/dropout.h"
#include "lora/lora.h"
#include "nf4/nf4.h"

namespace py = pybind11;

namespace pyfast {

py::list variants(const std::string& op) {
  std::vector<VariantInfo> rows = nf4::variants(op);
  if (rows.empty()) rows = dropout::variants(op);
  if (rows.empty()) rows = lora::variants(op);
  if (rows.empty()) rows = adapter::variants(op);
  if (rows.empty()) rows = dora::variants(op);
  PYFAST_CHECK(!rows.empty(), "variants: there is no op \"", op,
               "\"; there are nf4_quantize, nf4_nest, nf4_dequantize, nf4_few_rows, dropout, "
               "lora_linear, adapter_bottleneck, adapter_scale, adapter_scale_backward, "
               "scaled_linear_backward, "
               "dora_norms and dora_linear");
  py::list list;
  for (const VariantInfo& row : rows) {
    py::dict item;
    item["name"] = row.name;
    item["device"] = row.cuda ? "cuda" : "cpu";
    item["reason"] = row.reason;
    list.append(item);
  }
  return list;
}

}  // namespace pyfast
