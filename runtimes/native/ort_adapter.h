// What every operator's adapter needs from ONNX Runtime. A failure is an OrtStatus*, null when there is none; adapters
// hand a non-null one on to ONNX Runtime, which releases it. Nothing here throws unless it says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#include "ort_c_abi.h"
#include "shape.h"

namespace attn_deploy::native {

// For calls that return OrtStatus*, inside functions that do.
#define ATTN_DEPLOY_RETURN_IF_ERROR(expression)                                  \
  do {                                                                           \
    if (attn_deploy::ort::OrtStatus* status_ = (expression)) return status_;     \
  } while (false)

// "[2,3,7,7]". Throws std::bad_alloc.
std::string ToString(const Shape& shape);

// The error for inputs that an operator does not accept.
ort::OrtStatus* InvalidArgument(const ort::OrtApi& api, const std::string& message);

// Runs `body`, which returns an OrtStatus*, and turns what it throws into one: no exception may reach ONNX Runtime.
template <typename Body>
ort::OrtStatus* CatchAll(const ort::OrtApi& api, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return api.CreateStatus(ort::ORT_RUNTIME_EXCEPTION, "attn_deploy: unknown exception");
  }
}

// The name of the node that a kernel stands for, kept so that its errors can say it. Throws std::bad_alloc.
ort::OrtStatus* GetNodeName(const ort::OrtApi& api, const ort::OrtKernelInfo* info, std::string* name);

// Not `present` where the node leaves the input out. `data` of an empty tensor may be null.
struct InputTensor {
  bool present = false;
  ort::ONNXTensorElementDataType type = {};
  Shape shape;
  const void* data = nullptr;
};

// Input `index` of the node that is running. Valid until its Compute returns.
ort::OrtStatus* GetInput(const ort::OrtApi& api, const ort::OrtKernelContext* context, size_t index,
                         InputTensor* input);

// A tensor as it lies in memory.
ort::OrtStatus* ReadTensor(const ort::OrtApi& api, const ort::OrtValue* value, InputTensor* input);

// Makes output `index` with this shape, whose rank is at most kMaxRank, and gives its memory.
ort::OrtStatus* MakeOutput(const ort::OrtApi& api, ort::OrtKernelContext* context, size_t index, const Shape& shape,
                           void** data);

// Gives output 0 the shape that input 0 has in the graph, symbolic dims by name. Says nothing, which is always right,
// where input 0 has a dim with neither value nor name, or no shape.
ort::OrtStatus* InferOutputLikeFirstInput(const ort::OrtApi& api, ort::OrtShapeInferContext* context);

// A CPU operator since version 1 whose inputs and single output are all float32 and required. To be filled in by the
// caller: GetName, GetInputTypeCount, CreateKernelV2, KernelComputeV2, KernelDestroy and, if any, InferOutputShapeFn.
ort::OrtCustomOp FloatCpuOperator();

}  // namespace attn_deploy::native
