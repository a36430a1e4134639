// The runtime API of the emulated GPU, and what tests set of it.
#include <cstring>

#include "cuda_runtime_api.h"
#include "emulated_device.h"

namespace {

int multiprocessors = 1;
int compute_capability = 90;

}  // namespace

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount        ? multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? compute_capability / 10
                                                            : compute_capability % 10;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

extern "C" {

void emulation_set_device(int new_multiprocessors, int new_compute_capability) {
  multiprocessors = new_multiprocessors;
  compute_capability = new_compute_capability;
}

void emulation_fail_launches(int fail) { emulation::FailLaunches(fail != 0); }

void emulation_set_order(unsigned seed) { emulation::SetOrder(seed); }

void emulation_round_to_half(const float* values, uint16_t* bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bits[i] = attn_deploy::cuda::FromFloat<attn_deploy::cuda::Half>(values[i]).bits;
}

void emulation_round_to_bfloat16(const float* values, uint16_t* bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bits[i] = attn_deploy::cuda::FromFloat<attn_deploy::cuda::Bfloat16>(values[i]).bits;
  }
}

void emulation_half_values(const uint16_t* bits, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = attn_deploy::cuda::ToFloat(attn_deploy::cuda::Half{bits[i]});
}

}  // extern "C"
