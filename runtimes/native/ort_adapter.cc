#include "ort_adapter.h"

#include <algorithm>
#include <climits>
#include <cstring>

namespace attn_deploy::native {

using namespace ort;

std::string ToString(const Shape& shape) {
  std::string text = "[";
  for (int64_t d = 0; d < shape.rank; ++d) {
    if (d > 0) text += ",";
    if (d == kMaxRank) {
      text += "...";
      break;
    }
    text += std::to_string(shape.dims[d]);
  }
  return text + "]";
}

OrtStatus* InvalidArgument(const OrtApi& api, const std::string& message) {
  return api.CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
}

OrtStatus* GetNodeName(const OrtApi& api, const OrtKernelInfo* info, std::string* name) {
  size_t size = 0;  // with the final NUL
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelInfo_GetNodeName(info, nullptr, &size));
  name->resize(size);
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelInfo_GetNodeName(info, name->data(), &size));
  name->resize(std::strlen(name->c_str()));
  return nullptr;
}

namespace {

OrtStatus* ReadTypeAndShape(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info, InputTensor* input) {
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetTensorElementType(info, &input->type));
  size_t rank = 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetDimensionsCount(info, &rank));
  input->shape.rank = static_cast<int64_t>(rank);
  return api.GetDimensions(info, input->shape.dims, std::min<size_t>(rank, kMaxRank));
}

}  // namespace

OrtStatus* GetInput(const OrtApi& api, const OrtKernelContext* context, size_t index, InputTensor* input) {
  *input = InputTensor{};
  size_t count = 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelContext_GetInputCount(context, &count));
  if (index >= count) return nullptr;
  const OrtValue* value = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelContext_GetInput(context, index, &value));
  return value == nullptr ? nullptr : ReadTensor(api, value, input);
}

OrtStatus* ReadTensor(const OrtApi& api, const OrtValue* value, InputTensor* input) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = ReadTypeAndShape(api, info, input);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status != nullptr) return status;

  // The C ABI has no read-only access to a tensor's memory; nothing is written through this pointer.
  void* data = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  input->present = true;
  input->data = data;
  return nullptr;
}

OrtStatus* MakeOutput(const OrtApi& api, OrtKernelContext* context, size_t index, const Shape& shape, void** data) {
  OrtValue* value = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      api.KernelContext_GetOutput(context, index, shape.dims, static_cast<size_t>(shape.rank), &value));
  return api.GetTensorMutableData(value, data);
}

OrtStatus* InferOutputLikeFirstInput(const OrtApi& api, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own: not to be released
  ATTN_DEPLOY_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  size_t rank = 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetDimensionsCount(info, &rank));
  // An input without a shape also comes as rank 0.
  if (rank == 0 || rank > kMaxRank) return nullptr;
  int64_t dims[kMaxRank];
  const char* names[kMaxRank];
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetDimensions(info, dims, rank));
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetSymbolicDimensions(info, names, rank));
  for (size_t d = 0; d < rank; ++d) {
    // ONNX Runtime would write such a dim into the graph as the number -1.
    const bool has_name = names[d] != nullptr && names[d][0] != '\0';
    if (dims[d] < 0 && !has_name) return nullptr;
  }
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
}

OrtCustomOp FloatCpuOperator() {
  OrtCustomOp op = {};
  op.version = kApiVersion;
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  return op;
}

}  // namespace attn_deploy::native
