#include "operator.h"

#include <climits>

namespace attn_deploy::native {

using namespace ort;

ONNXTensorElementDataType OnnxType(ElementType type) {
  switch (type) {
    case ElementType::kInt64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case ElementType::kBool:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case ElementType::kInt8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case ElementType::kUint8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case ElementType::kInt32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case ElementType::kFloat:
      break;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

namespace {

const CpuOp& AsCpuOp(const OrtCustomOp* op) { return *static_cast<const CpuOp*>(op); }

OrtStatus* CreateKernelOfNode(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** result) {
  return CatchAll(*api, [&]() -> OrtStatus* {
    std::string node_name;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetNodeName(*api, info, &node_name));
    std::unique_ptr<Kernel> kernel;
    const CpuOp& cpu_op = AsCpuOp(op);
    ATTN_DEPLOY_RETURN_IF_ERROR(cpu_op.make(cpu_op, info, std::move(node_name), &kernel));
    *result = kernel.release();
    return nullptr;
  });
}

// Rank 0 where the graph knows no shape. `names` points into the graph.
OrtStatus* ReadShape(const OrtApi& api, OrtShapeInferContext* context, size_t index, Shape* shape,
                     const char* (&names)[kMaxRank]) {
  *shape = Shape{};
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own: not to be released
  ATTN_DEPLOY_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetDimensionsCount(info, &rank));
  if (rank == 0 || rank > kMaxRank) return nullptr;
  shape->rank = static_cast<int64_t>(rank);
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetDimensions(info, shape->dims, rank));
  return api.GetSymbolicDimensions(info, names, rank);
}

OrtStatus* SetOutput(const OrtApi& api, OrtShapeInferContext* context, size_t index, ElementType type,
                     const Shape& output, const char* (&names)[kMaxRank]) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.CreateTensorTypeAndShapeInfo(&info));
  const auto rank = static_cast<size_t>(output.rank);
  OrtStatus* status = api.SetTensorElementType(info, OnnxType(type));
  if (status == nullptr) status = api.SetDimensions(info, output.dims, rank);
  if (status == nullptr) status = api.SetSymbolicDimensions(info, names, rank);
  if (status == nullptr) status = api.ShapeInferContext_SetOutputTypeShape(context, index, info);
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

OrtStatus* InferOutputShape(const CpuOp& op, OrtShapeInferContext* context, const std::vector<Shape>& inputs,
                            const char* (&first_names)[kMaxRank], size_t index) {
  Shape output;
  int from[kMaxRank] = {};
  for (int d = 0; d < kMaxRank; ++d) from[d] = d;
  const CpuOp::InferShape infer = index == 0 ? op.infer : op.infer_more[index - 1];
  if (!infer(inputs, &output, from)) return nullptr;
  const char* names[kMaxRank] = {};
  for (int64_t d = 0; d < output.rank; ++d) {
    names[d] = output.dims[d] < 0 ? first_names[from[d]] : "";
    // ONNX Runtime would write a dim with neither value nor name into the graph as the number -1.
    if (output.dims[d] < 0 && (names[d] == nullptr || names[d][0] == '\0')) return nullptr;
  }
  return SetOutput(op.api, context, index, op.output_type, output, names);
}

OrtStatus* InferOutputShapes(const CpuOp& op, OrtShapeInferContext* context) {
  std::vector<Shape> inputs(op.inputs.size());
  const char* first_names[kMaxRank] = {};
  const char* ignored[kMaxRank] = {};
  for (size_t i = 0; i < inputs.size(); ++i) {
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadShape(op.api, context, i, &inputs[i], i == 0 ? first_names : ignored));
  }
  if (inputs.empty() || inputs[0].rank == 0) return nullptr;
  for (size_t index = 0; index <= op.infer_more.size(); ++index) {
    ATTN_DEPLOY_RETURN_IF_ERROR(InferOutputShape(op, context, inputs, first_names, index));
  }
  return nullptr;
}

}  // namespace

CpuOp::CpuOp(const OrtApi& api_, std::string name_, std::vector<Operand> inputs_, MakeKernel make_, InferShape infer_,
             const void* form_, std::vector<InferShape> infer_more_)
    : OrtCustomOp(FloatCpuOperator()),
      api(api_),
      name(std::move(name_)),
      inputs(std::move(inputs_)),
      make(make_),
      infer(infer_),
      infer_more(std::move(infer_more_)),
      form(form_) {
  GetName = [](const OrtCustomOp* o) { return AsCpuOp(o).name.c_str(); };
  GetInputType = [](const OrtCustomOp* o, size_t i) { return OnnxType(AsCpuOp(o).inputs[i].type); };
  GetInputTypeCount = [](const OrtCustomOp* o) { return AsCpuOp(o).inputs.size(); };
  GetOutputType = [](const OrtCustomOp* o, size_t) { return OnnxType(AsCpuOp(o).output_type); };
  GetOutputTypeCount = [](const OrtCustomOp* o) { return 1 + AsCpuOp(o).infer_more.size(); };
  CreateKernelV2 = CreateKernelOfNode;
  KernelComputeV2 = [](void* k, OrtKernelContext* context) {
    const auto& kernel = *static_cast<const Kernel*>(k);
    return CatchAll(kernel.Api(), [&] { return kernel.Compute(context); });
  };
  KernelDestroy = [](void* k) { delete static_cast<Kernel*>(k); };
  if (infer != nullptr) {
    InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
      return CatchAll(AsCpuOp(o).api, [&] { return InferOutputShapes(AsCpuOp(o), context); });
    };
  }
}

const OrtApi& Kernel::Api() const { return op.api; }

OrtStatus* Kernel::Fail(const std::string& message) const {
  return InvalidArgument(op.api, op.name + " node '" + node_name + "': " + message);
}

OrtStatus* Kernel::GetInputs(const OrtKernelContext* context, std::vector<InputTensor>* inputs) const {
  inputs->resize(op.inputs.size());
  for (size_t i = 0; i < inputs->size(); ++i) {
    InputTensor& input = (*inputs)[i];
    ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(op.api, context, i, &input));
    const auto expected = OnnxType(op.inputs[i].type);
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

bool LikeFirstInput(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  *output = inputs[0];
  return true;
}

OrtStatus* GetFloat(const OrtApi& api, const OrtKernelInfo* info, const char* name, float* value) {
  return api.KernelInfoGetAttribute_float(info, name, value);
}

OrtStatus* GetInt(const OrtApi& api, const OrtKernelInfo* info, const char* name, int64_t* value) {
  return api.KernelInfoGetAttribute_int64(info, name, value);
}

OrtStatus* GetConstant(const OrtApi& api, const OrtKernelInfo* info, size_t index, InputTensor* input) {
  *input = InputTensor{};
  int is_constant = 0;
  const OrtValue* value = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) return nullptr;
  return ReadTensor(api, value, input);
}

}  // namespace attn_deploy::native
