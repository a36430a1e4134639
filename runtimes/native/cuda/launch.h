// Launching a kernel, in one place for nvcc and for the host's emulation.
#pragma once

#include "device.cuh"

namespace attn_deploy::cuda {

// `shared_bytes` above the 48 KiB that every kernel may have are asked for first.
template <typename... Parameters>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Parameters&... arguments) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace attn_deploy::cuda
