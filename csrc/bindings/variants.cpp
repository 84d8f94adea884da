// SPDX-License-Identifier: Apache-2.0
#include "bindings/bindings.h"
#include "dropout/dropout.h"
#include "lora/lora.h"
#include "nf4/nf4.h"

namespace py = pybind11;

namespace pyfast {

py::list variants(const std::string& op) {
  std::vector<VariantInfo> rows = nf4::variants(op);
  if (rows.empty()) rows = dropout::variants(op);
  if (rows.empty()) rows = lora::variants(op);
  PYFAST_CHECK(!rows.empty(), "variants: there is no op \"", op,
               "\"; there are nf4_quantize, nf4_nest, nf4_dequantize, nf4_few_rows, dropout and "
               "lora_linear");
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
