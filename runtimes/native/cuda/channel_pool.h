// The ChannelPool kernel: mean and maximum of every channel's plane in one pass. Knows nothing of ONNX Runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace attn_deploy::cuda {

// Device memory, dense. x is [planes, pixels]; mean and maximum are [planes], either may be null.
struct ChannelPoolArguments {
  const void* x = nullptr;
  void* mean = nullptr;
  void* maximum = nullptr;
  int64_t planes = 0;
  int64_t pixels = 0;
};

// Sums are FP32. The maximum of a plane that holds NaN is NaN. Returns what the launch returned;
// cudaErrorInvalidValue for planes without pixels.
cudaError_t LaunchChannelPool(const ChannelPoolArguments& arguments, Element element, const Device& device,
                              cudaStream_t stream);

}  // namespace attn_deploy::cuda
