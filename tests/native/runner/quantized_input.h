// The packed 8-bit weights of a case.
#pragma once

#include "case.h"
#include "kernels/quantized_weights.h"
#include "scratch.h"

namespace attn_deploy::native::runner {

// Inputs `at` to `at` + 2: weight [in, out] as uint8, its scales [out], bias [out].
inline QuantizedWeights PackedInput(const Case& c, size_t at, int64_t groups, AlignedBuffer* memory) {
  const Array& weight = c.inputs.at(at);
  const int64_t in = weight.dims.at(0);
  const int64_t out = weight.dims.at(1);
  const int64_t size = ATTN_DEPLOY_INT8_KERNEL(QuantizedWeightsSize)(in, out, groups);
  void* const packed = memory->Floats((size + 3) / 4);
  ATTN_DEPLOY_INT8_KERNEL(PackQuantizedWeights)
  (reinterpret_cast<const uint8_t*>(weight.bytes()), c.inputs.at(at + 1).floats(), c.inputs.at(at + 2).floats(), in,
   out, groups, packed);
  return {packed, in, out, groups};
}

}  // namespace attn_deploy::native::runner
