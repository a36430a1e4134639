// The weights of a linear layer, read from a node's constants and packed.
#pragma once

#include "kernels/packed_weights.h"
#include "operator.h"
#include "scratch.h"

namespace attn_deploy::native {

// Which inputs of the node they are; no norm where its scale is 0, which is x.
struct LinearInputs {
  size_t weight;
  size_t bias;
  size_t norm_scale = 0;
  size_t norm_bias = 0;
};

class LinearWeights {
 public:
  // weight [in, out], bias [out], norm_scale and norm_bias [in], all constants: else an error with the node's name.
  // What LayerNorm multiplies and adds is made part of weight and bias, in double. Throws std::bad_alloc.
  ort::OrtStatus* Read(const Kernel& kernel, const ort::OrtKernelInfo* info, const LinearInputs& inputs);

  PackedWeights packed() const { return packed_; }
  int64_t in() const { return packed_.in; }
  int64_t out() const { return packed_.out; }

 private:
  AlignedBuffer memory_;
  PackedWeights packed_;
};

// Constant `index` of the node, of the element type that its operator declares and of this shape, where a dim of -1 is
// any of 1 or more: else an error with the node's name. Valid while the kernel is made.
ort::OrtStatus* ReadConstant(const Kernel& kernel, const ort::OrtKernelInfo* info, size_t index, const Shape& expected,
                             InputTensor* input);

// x [..., in] as rows of `in` numbers: how many, and an error with the node's name where x is of another shape.
ort::OrtStatus* CountRows(const Kernel& kernel, const Shape& x, int64_t in, int64_t* rows);

}  // namespace attn_deploy::native
