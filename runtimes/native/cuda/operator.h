// What the CUDA operators' adapters share. An operator is registered once for each element type, under one name:
// ONNX Runtime merges the types into one schema and picks the kernel by the node's types.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

#include "../ort_adapter.h"
#include "element.h"

namespace attn_deploy::cuda {

enum class Kind { kElement, kInt64, kBool };  // kElement: the type that the operator is registered for

struct Operand {
  const char* name;
  Kind kind = Kind::kElement;
};

struct CudaOp;

// One node of a session. Compute may run on several threads at once.
class Kernel {
 public:
  Kernel(const CudaOp& op, std::string node_name, const Device& device)
      : op(op), node_name(std::move(node_name)), device(device) {}
  virtual ~Kernel() = default;

  // Checks inputs, makes outputs and starts the work on the node's stream. Throws std::bad_alloc.
  virtual ort::OrtStatus* Compute(ort::OrtKernelContext* context) const = 0;

  const ort::OrtApi& Api() const;

  // "PackedAttention node 'block/attention': " and the message, as an error.
  ort::OrtStatus* Fail(const std::string& message) const;
  ort::OrtStatus* CheckCuda(cudaError_t error, const char* what) const;

  // All inputs of the node; fails where one is missing or of another type.
  ort::OrtStatus* GetInputs(const ort::OrtKernelContext* context, std::vector<native::InputTensor>* inputs) const;

  const CudaOp& op;
  const std::string node_name;
  const Device device;
};

// An operator as ONNX Runtime holds on to it: lives as long as every session that uses it.
struct CudaOp : ort::OrtCustomOp {
  using MakeKernel = ort::OrtStatus* (*)(const CudaOp& op, const ort::OrtKernelInfo* info, std::string node_name,
                                     const Device& device, std::unique_ptr<Kernel>* kernel);
  // Gives the outputs their shapes from the first input's dims; -1 is a dim that only `names` knows.
  using InferDims = bool (*)(const native::Shape& first, native::Shape* output, int (&from)[native::kMaxRank]);

  CudaOp(const ort::OrtApi& api, std::string name, std::vector<Operand> inputs, size_t outputs, Element element,
         MakeKernel make, InferDims infer);
  virtual ~CudaOp() = default;

  const ort::OrtApi& api;
  const std::string name;
  const std::vector<Operand> inputs;
  const size_t outputs;
  const Element element;
  const MakeKernel make;
  const InferDims infer;
};

using Operators = std::vector<std::unique_ptr<CudaOp>>;

// Each appends its forms for one element type.
void AppendPackedAttention(const ort::OrtApi& api, Element element, Operators* operators);
void AppendGate(const ort::OrtApi& api, Element element, Operators* operators);
void AppendChannelPool(const ort::OrtApi& api, Element element, Operators* operators);

// Fails unless `value` fits an int, which kernels count sizes in.
ort::OrtStatus* ToInt(const Kernel& kernel, const char* what, int64_t value, int* result);

// The stream that the node's work belongs to.
ort::OrtStatus* GetStream(const ort::OrtApi& api, const ort::OrtKernelContext* context, cudaStream_t* stream);

}  // namespace attn_deploy::cuda
