#include "operator.h"

#include <climits>
#include <utility>

#ifndef ATTN_DEPLOY_PROVIDER
#define ATTN_DEPLOY_PROVIDER "CUDAExecutionProvider"
#endif

namespace attn_deploy::cuda {

using namespace ort;
using native::CatchAll;
using native::InputTensor;
using native::kMaxRank;
using native::Shape;

namespace {

const CudaOp& AsCudaOp(const OrtCustomOp* op) { return *static_cast<const CudaOp*>(op); }

ONNXTensorElementDataType OnnxType(Element element) {
  switch (element) {
    case Element::kFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Element::kBfloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Element::kFloat32:
      break;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

ONNXTensorElementDataType OnnxType(const CudaOp& op, size_t input) {
  switch (op.inputs[input].kind) {
    case Kind::kInt64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case Kind::kBool:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case Kind::kElement:
      break;
  }
  return OnnxType(op.element);
}

OrtStatus* GetDevice(const OrtApi& api, Device* device) {
  int ordinal = 0;
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  device->compute_capability = 10 * major + minor;
  if (error == cudaSuccess) return nullptr;
  const std::string message = std::string("attn_deploy CUDA library: no usable GPU: ") + cudaGetErrorString(error);
  return api.CreateStatus(ORT_EP_FAIL, message.c_str());
}

OrtStatus* CreateKernelOfNode(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** result) {
  return CatchAll(*api, [&]() -> OrtStatus* {
    std::string node_name;
    ATTN_DEPLOY_RETURN_IF_ERROR(native::GetNodeName(*api, info, &node_name));
    Device device;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetDevice(*api, &device));
    std::unique_ptr<Kernel> kernel;
    const CudaOp& cuda_op = AsCudaOp(op);
    ATTN_DEPLOY_RETURN_IF_ERROR(cuda_op.make(cuda_op, info, std::move(node_name), device, &kernel));
    *result = kernel.release();
    return nullptr;
  });
}

// Tells the graph the outputs' type and shape. The type is the first input's and not the operator's: of the operators
// of one name ONNX Runtime asks only the first, and later releases (1.32; 1.17 did not) take the type that it says.
OrtStatus* SetOutputs(const CudaOp& op, OrtShapeInferContext* context, ONNXTensorElementDataType type,
                      const Shape& output, const char* (&names)[kMaxRank]) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(op.api.CreateTensorTypeAndShapeInfo(&info));
  const auto rank = static_cast<size_t>(output.rank);
  OrtStatus* status = op.api.SetTensorElementType(info, type);
  if (status == nullptr) status = op.api.SetDimensions(info, output.dims, rank);
  if (status == nullptr) status = op.api.SetSymbolicDimensions(info, names, rank);
  for (size_t i = 0; status == nullptr && i < op.outputs; ++i) {
    status = op.api.ShapeInferContext_SetOutputTypeShape(context, i, info);
  }
  op.api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

// Where `op.infer` finds the outputs' shape; `from` says which dim of the first input has the name of an output's dim
// without a value.
OrtStatus* InferOutputShape(const OrtCustomOp* base, OrtShapeInferContext* context) {
  const CudaOp& op = AsCudaOp(base);
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own: not to be released
  ATTN_DEPLOY_RETURN_IF_ERROR(op.api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  ONNXTensorElementDataType type = {};
  size_t rank = 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(op.api.GetTensorElementType(info, &type));
  ATTN_DEPLOY_RETURN_IF_ERROR(op.api.GetDimensionsCount(info, &rank));
  if (rank == 0 || rank > kMaxRank) return nullptr;  // an input without a shape also comes as rank 0
  Shape first;
  first.rank = static_cast<int64_t>(rank);
  const char* first_names[kMaxRank] = {};
  ATTN_DEPLOY_RETURN_IF_ERROR(op.api.GetDimensions(info, first.dims, rank));
  ATTN_DEPLOY_RETURN_IF_ERROR(op.api.GetSymbolicDimensions(info, first_names, rank));

  Shape output;
  int from[kMaxRank] = {};
  if (!op.infer(first, &output, from)) return nullptr;
  const char* names[kMaxRank] = {};
  for (int64_t d = 0; d < output.rank; ++d) {
    names[d] = output.dims[d] < 0 ? first_names[from[d]] : "";
    // ONNX Runtime would write a dim with neither value nor name into the graph as the number -1.
    if (output.dims[d] < 0 && (names[d] == nullptr || names[d][0] == '\0')) return nullptr;
  }
  return SetOutputs(op, context, type, output, names);
}

void SetCallbacks(OrtCustomOp* op) {
  op->version = kApiVersion;
  op->GetName = [](const OrtCustomOp* o) { return AsCudaOp(o).name.c_str(); };
  op->GetExecutionProviderType = [](const OrtCustomOp*) { return ATTN_DEPLOY_PROVIDER; };
  op->GetInputType = [](const OrtCustomOp* o, size_t i) { return OnnxType(AsCudaOp(o), i); };
  op->GetInputTypeCount = [](const OrtCustomOp* o) { return AsCudaOp(o).inputs.size(); };
  op->GetOutputType = [](const OrtCustomOp* o, size_t) { return OnnxType(AsCudaOp(o).element); };
  op->GetOutputTypeCount = [](const OrtCustomOp* o) { return AsCudaOp(o).outputs; };
  op->GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op->GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op->GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  op->CreateKernelV2 = CreateKernelOfNode;
  op->KernelComputeV2 = [](void* k, OrtKernelContext* context) {
    const auto& kernel = *static_cast<const Kernel*>(k);
    return CatchAll(kernel.Api(), [&] { return kernel.Compute(context); });
  };
  op->KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op->InferOutputShapeFn = InferOutputShape;
}

}  // namespace

CudaOp::CudaOp(const OrtApi& api_, std::string name_, std::vector<Operand> inputs_, size_t outputs_, Element element_,
               MakeKernel make_, InferDims infer_)
    : OrtCustomOp{},
      api(api_),
      name(std::move(name_)),
      inputs(std::move(inputs_)),
      outputs(outputs_),
      element(element_),
      make(make_),
      infer(infer_) {
  SetCallbacks(this);
}

const OrtApi& Kernel::Api() const { return op.api; }

OrtStatus* Kernel::Fail(const std::string& message) const {
  return native::InvalidArgument(op.api, op.name + " node '" + node_name + "': " + message);
}

OrtStatus* Kernel::CheckCuda(cudaError_t error, const char* what) const {
  if (error == cudaSuccess) return nullptr;
  const std::string message = op.name + " node '" + node_name + "': " + what + ": " + cudaGetErrorString(error);
  return op.api.CreateStatus(ORT_EP_FAIL, message.c_str());
}

OrtStatus* Kernel::GetInputs(const OrtKernelContext* context, std::vector<InputTensor>* inputs) const {
  inputs->resize(op.inputs.size());
  for (size_t i = 0; i < inputs->size(); ++i) {
    InputTensor& input = (*inputs)[i];
    ATTN_DEPLOY_RETURN_IF_ERROR(native::GetInput(op.api, context, i, &input));
    const auto expected = OnnxType(op, i);
    if (!input.present || input.type != expected) {
      return Fail(std::string(op.inputs[i].name) + " has ONNX element type " + std::to_string(input.type) +
                  "; expected " + std::to_string(expected));
    }
    if (input.shape.rank > kMaxRank) {
      return Fail(std::string(op.inputs[i].name) + " has rank " + std::to_string(input.shape.rank) +
                  "; expected at most " + std::to_string(kMaxRank));
    }
  }
  return nullptr;
}

OrtStatus* ToInt(const Kernel& kernel, const char* what, int64_t value, int* result) {
  if (value < 0 || value > INT_MAX) {
    return kernel.Fail(std::string(what) + " is " + std::to_string(value) + "; expected at most " +
                       std::to_string(INT_MAX));
  }
  *result = static_cast<int>(value);
  return nullptr;
}

OrtStatus* GetStream(const OrtApi& api, const OrtKernelContext* context, cudaStream_t* stream) {
  void* handle = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelContext_GetGPUComputeStream(context, &handle));
  *stream = static_cast<cudaStream_t>(handle);
  return nullptr;
}

}  // namespace attn_deploy::cuda
