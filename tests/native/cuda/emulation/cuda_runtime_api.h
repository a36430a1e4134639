// In the place of CUDA's header of this name: the part of the runtime API that the library calls, on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simulator.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream);

// Turing's limit holds, the lowest of those the kernels are for.
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::kMostSharedBytes) return cudaErrorInvalidValue;
  emulation::AllowSharedBytes(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

// Runs the whole grid before it returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const emulation::Grid grid = {config->gridDim.x, config->gridDim.y, config->blockDim.x,
                                static_cast<int>(config->dynamicSmemBytes)};
  const bool started =
      emulation::Run(reinterpret_cast<const void*>(kernel), grid, [&] { kernel(Parameters(arguments)...); });
  return started ? cudaSuccess : cudaErrorInvalidValue;
}
