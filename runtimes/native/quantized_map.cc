#include "quantized_map.h"

#include <cmath>

namespace attn_deploy::native {

using namespace ort;

namespace {

bool Fits(const Shape& shape, const Shape& expected) {
  bool fits = shape.rank == expected.rank;
  for (int64_t d = 0; fits && d < shape.rank; ++d) fits = expected.dims[d] < 0 || shape.dims[d] == expected.dims[d];
  return fits;
}

}  // namespace

OrtStatus* ReadTyped(const Kernel& kernel, const OrtKernelInfo* info, size_t index, ONNXTensorElementDataType type,
                     const Shape& expected, InputTensor* input) {
  const std::string name = kernel.op.inputs[index].name;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetConstant(kernel.Api(), info, index, input));
  if (!input->present) return kernel.Fail(name + " is not a constant; expected an initializer of the model");
  if (input->type == type && Fits(input->shape, expected)) return nullptr;
  return kernel.Fail(name + " has ONNX element type " + std::to_string(input->type) + " and shape " +
                     ToString(input->shape) + "; expected type " + std::to_string(type) + " and shape " +
                     ToString(expected) + ", where -1 is any number");
}

OrtStatus* ReadLevels(const Kernel& kernel, const OrtKernelInfo* info, size_t index, int64_t channels,
                      Levels* levels) {
  InputTensor scale, zero;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ReadTyped(kernel, info, index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {1, {-1}}, &scale));
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ReadTyped(kernel, info, index + 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {1, {1}}, &zero));
  const std::string name = kernel.op.inputs[index].name;
  const int64_t count = scale.shape.dims[0];
  if (count != 1 && count != channels) {
    return kernel.Fail(name + " has shape " + ToString(scale.shape) + "; expected [1] or [" +
                       std::to_string(channels) + "]");
  }
  const auto* const scales = static_cast<const float*>(scale.data);
  levels->scale.resize(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    const float value = scales[count == 1 ? 0 : c];
    if (!(value > 0.0f) || !std::isfinite(value)) {
      return kernel.Fail(name + "[" + std::to_string(c) + "] is " + std::to_string(value) +
                         "; expected a finite number above 0");
    }
    levels->scale[static_cast<size_t>(c)] = value;
  }
  levels->zero = *static_cast<const uint8_t*>(zero.data);
  return nullptr;
}

OrtStatus* ExpectShape(const Kernel& kernel, const char* name, const Shape& shape, const Shape& expected) {
  if (Fits(shape, expected)) return nullptr;
  return kernel.Fail(std::string(name) + " has shape " + ToString(shape) + "; expected " + ToString(expected) +
                     ", where -1 is any number");
}

}  // namespace attn_deploy::native
