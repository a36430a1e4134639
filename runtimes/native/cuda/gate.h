// The Gate kernel on CUDA: activation(x * gate + residual) in one pass over the tensors. Knows nothing of ONNX Runtime.
#pragma once

#include <cuda_runtime_api.h>

#include "../activation.h"
#include "../gate_plan.h"
#include "element.h"

namespace attn_deploy::cuda {

// Device memory, dense. `plan` merges the dims of any layout, NCHW or NHWC, into runs along which the gate repeats or
// advances. `residual` is null where the form has none. `output` may be x or residual.
struct GateArguments {
  const void* x = nullptr;
  const void* gate = nullptr;
  const void* residual = nullptr;
  void* output = nullptr;
  native::GatePlan plan;
};

// Sums and activations are FP32. Returns what the launch returned.
cudaError_t LaunchGate(const GateArguments& arguments, native::Activation activation, Element element,
                       const Device& device, cudaStream_t stream);

}  // namespace attn_deploy::cuda
