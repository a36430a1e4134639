#include "linear_weights.h"

#include <string>
#include <vector>

namespace attn_deploy::native {

using namespace ort;

namespace {

const char* TypeName(ElementType type) { return type == ElementType::kUint8 ? "uint8 (2)" : "float32 (1)"; }

}  // namespace

OrtStatus* ReadConstant(const Kernel& kernel, const OrtKernelInfo* info, size_t index, const Shape& expected,
                        InputTensor* input) {
  const std::string name = kernel.op.inputs[index].name;
  const ElementType type = kernel.op.inputs[index].type;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetConstant(kernel.Api(), info, index, input));
  if (!input->present) return kernel.Fail(name + " is not a constant; expected an initializer of the model");
  const Shape& shape = input->shape;
  bool fits = input->type == OnnxType(type) && shape.rank == expected.rank;
  for (int64_t d = 0; fits && d < shape.rank; ++d) {
    fits = shape.dims[d] >= 1 && (expected.dims[d] < 0 || shape.dims[d] == expected.dims[d]);
  }
  if (fits) return nullptr;
  return kernel.Fail(name + " has ONNX element type " + std::to_string(input->type) + " and shape " + ToString(shape) +
                     "; expected " + TypeName(type) + " of shape " + ToString(expected) +
                     ", where -1 is any number above 0");
}

OrtStatus* LinearWeights::Read(const Kernel& kernel, const OrtKernelInfo* info, const LinearInputs& inputs) {
  InputTensor weight, bias, norm_scale, norm_bias;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.weight, {2, {-1, -1}}, &weight));
  const int64_t in = weight.shape.dims[0];
  const int64_t out = weight.shape.dims[1];
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.bias, {1, {out}}, &bias));
  const auto* weights = static_cast<const float*>(weight.data);
  const auto* biases = static_cast<const float*>(bias.data);

  std::vector<float> scaled_weights;
  std::vector<float> shifted_biases;
  if (inputs.norm_scale != 0) {
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.norm_scale, {1, {in}}, &norm_scale));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.norm_bias, {1, {in}}, &norm_bias));
    scaled_weights.resize(static_cast<size_t>(in * out));
    std::vector<double> sums(biases, biases + out);
    for (int64_t i = 0; i < in; ++i) {
      const double scale = static_cast<const float*>(norm_scale.data)[i];
      const double shift = static_cast<const float*>(norm_bias.data)[i];
      for (int64_t o = 0; o < out; ++o) {
        const auto at = static_cast<size_t>(i * out + o);
        scaled_weights[at] = static_cast<float>(scale * weights[at]);
        sums[static_cast<size_t>(o)] += shift * weights[at];
      }
    }
    shifted_biases.assign(sums.begin(), sums.end());
    weights = scaled_weights.data();
    biases = shifted_biases.data();
  }
  float* const data = memory_.Floats(ATTN_DEPLOY_KERNEL(PackedWeightsSize)(in, out));
  ATTN_DEPLOY_KERNEL(PackWeights)(weights, biases, in, out, data);
  packed_ = {data, in, out};
  return nullptr;
}

OrtStatus* CountRows(const Kernel& kernel, const Shape& x, int64_t in, int64_t* rows) {
  if (x.rank < 1 || x.dims[x.rank - 1] != in) {
    return kernel.Fail("x has shape " + ToString(x) + "; expected [...," + std::to_string(in) + "]");
  }
  *rows = 1;
  for (int64_t d = 0; d + 1 < x.rank; ++d) *rows *= x.dims[d];
  return nullptr;
}

}  // namespace attn_deploy::native
