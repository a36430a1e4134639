// The 8-bit weights of a linear layer, read from a node's constants and packed.
#pragma once

#include <vector>

#include "kernels/quantized_weights.h"
#include "operator.h"
#include "scratch.h"

namespace attn_deploy::native {

// Which inputs of the node they are.
struct QuantizedLinearInputs {
  size_t weight;
  size_t weight_scale;
  size_t bias;
};

class QuantizedLinearWeights {
 public:
  // weight uint8 [in, out], `in` at most 65,536, whose 128 is 0; weight_scale [out], above 0 and finite; bias [out]. All
  // constants: else an error with the node's name. `groups`: of inputs, as QuantizedWeights has them, which has to
  // divide `in`. Throws std::bad_alloc.
  ort::OrtStatus* Read(const Kernel& kernel, const ort::OrtKernelInfo* info, const QuantizedLinearInputs& inputs,
                       int64_t groups = 1);

  QuantizedWeights packed() const { return packed_; }
  int64_t in() const { return packed_.in; }
  int64_t out() const { return packed_.out; }

 private:
  AlignedBuffer memory_;
  QuantizedWeights packed_;
};

// A constant float32 input of shape [size] whose numbers are finite, as LayerNorm's scale and bias are: else an error
// with the node's name.
ort::OrtStatus* ReadFiniteVector(const Kernel& kernel, const ort::OrtKernelInfo* info, size_t index, int64_t size,
                                 std::vector<float>* values);

}  // namespace attn_deploy::native
