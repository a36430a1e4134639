#include "quantized_linear_weights.h"

#include <cmath>
#include <string>

#include "linear_weights.h"

namespace attn_deploy::native {

using namespace ort;

namespace {

// 65,536 * 255 * 128 is the largest sum that 32 bits hold.
constexpr int64_t kMostInputs = 65536;

OrtStatus* CheckScales(const Kernel& kernel, const char* name, const float* scales, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(scales[i] > 0.0f) || !std::isfinite(scales[i])) {
      return kernel.Fail(std::string(name) + " is " + std::to_string(scales[i]) + " at " + std::to_string(i) +
                         "; expected finite numbers above 0");
    }
  }
  return nullptr;
}

}  // namespace

OrtStatus* QuantizedLinearWeights::Read(const Kernel& kernel, const OrtKernelInfo* info,
                                        const QuantizedLinearInputs& inputs, int64_t groups) {
  InputTensor weight, scale, bias;
  const auto name = [&](size_t index) { return kernel.op.inputs[index].name; };
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.weight, {2, {-1, -1}}, &weight));
  const int64_t in = weight.shape.dims[0];
  const int64_t out = weight.shape.dims[1];
  if (in > kMostInputs) {
    return kernel.Fail(std::string(name(inputs.weight)) + " has " + std::to_string(in) +
                       " inputs; expected at most " + std::to_string(kMostInputs));
  }
  if (groups < 1 || in % groups != 0) {
    return kernel.Fail("groups is " + std::to_string(groups) + "; expected a divisor of " + std::to_string(in) +
                       ", the inputs of " + name(inputs.weight));
  }
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.weight_scale, {1, {out}}, &scale));
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, inputs.bias, {1, {out}}, &bias));
  const auto* const scales = static_cast<const float*>(scale.data);
  ATTN_DEPLOY_RETURN_IF_ERROR(CheckScales(kernel, name(inputs.weight_scale), scales, out));
  const int64_t bytes = ATTN_DEPLOY_INT8_KERNEL(QuantizedWeightsSize)(in, out, groups);
  float* const data = memory_.Floats(bytes / static_cast<int64_t>(sizeof(float)));
  ATTN_DEPLOY_INT8_KERNEL(PackQuantizedWeights)(static_cast<const uint8_t*>(weight.data), scales,
                                                static_cast<const float*>(bias.data), in, out, groups, data);
  packed_ = {data, in, out, groups};
  return nullptr;
}

OrtStatus* ReadFiniteVector(const Kernel& kernel, const OrtKernelInfo* info, size_t index, int64_t size,
                            std::vector<float>* values) {
  InputTensor input;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadConstant(kernel, info, index, {1, {size}}, &input));
  const auto* const data = static_cast<const float*>(input.data);
  values->assign(data, data + size);
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isfinite(data[i])) {
      return kernel.Fail(std::string(kernel.op.inputs[index].name) + " is " + std::to_string(data[i]) + " at " +
                         std::to_string(i) + "; expected finite numbers");
    }
  }
  return nullptr;
}

}  // namespace attn_deploy::native
