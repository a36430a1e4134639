// Everything that names the hardware: element types, tensor cores, asynchronous copies, special functions. Kernels use
// nothing else of the kind, so that the tests run the same source on the host with another file in this one's place.
#pragma once

#ifdef ATTN_DEPLOY_EMULATION
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace attn_deploy::cuda {

using Half = __half;
using Bfloat16 = __nv_bfloat16;

__device__ inline float ToFloat(float v) { return v; }
__device__ inline float ToFloat(Half v) { return __half2float(v); }
__device__ inline float ToFloat(Bfloat16 v) { return __bfloat162float(v); }

// To the nearest T, ties to even.
template <typename T>
__device__ T FromFloat(float v);
template <>
__device__ inline float FromFloat<float>(float v) {
  return v;
}
template <>
__device__ inline Half FromFloat<Half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline Bfloat16 FromFloat<Bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two 16-bit elements in one register, `low` at the lower address.
template <typename T>
__device__ uint32_t Pack(float low, float high);
template <>
__device__ inline uint32_t Pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t Pack<Bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ float2 Unpack(uint32_t pair);
template <>
__device__ inline float2 Unpack<Half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ inline float2 Unpack<Bfloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// 2^v within 2 ulp; results below the smallest normal number are 0.
__device__ inline float Exp2(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* SharedMemory() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return shared_memory;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lanes 8 i to 8 i + 7 pass the addresses of the rows of
// matrix i, each 16 bytes and aligned to it. Lane l gets of matrix i, in parts[i], the elements 2 (l % 4) and the one
// after it of row l / 4.
__device__ inline void LoadMatrices(uint32_t (&parts)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
}

// The same of the matrices' transposes.
__device__ inline void LoadMatricesTransposed(uint32_t (&parts)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
}

// sum += a b for a [16, 16], b [16, 8], sum [16, 8] in FP32, spread over the warp as PTX lays out mma.m16n8k16: with
// g = lane / 4 and t = 2 (lane % 4), a holds rows g, g + 8, g, g + 8 at columns t, t, t + 8, t + 8; b rows t and t + 8
// of column g; each register two neighbours of the summed dimension. sum holds (g, t), (g, t + 1), (g + 8, t),
// (g + 8, t + 1).
template <typename T>
__device__ void MultiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void MultiplyAdd<Half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing multiplies 8 columns of a at a time.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, {%0, %1, %2, %3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ inline void MultiplyAdd<Bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing has none for bfloat16: the launcher takes the kernel without tensor cores there.
  __trap();
#endif
}

// 16 bytes from global to shared memory, both aligned to 16. What a thread copied is there for itself after WaitFor,
// for the others after a barrier behind that. Turing copies at once.
__device__ inline void CopyAsync(void* shared, const void* global) { __pipeline_memcpy_async(shared, global, 16); }

// Ends a group of this thread's copies.
__device__ inline void CommitCopies() { __pipeline_commit(); }

// Waits for all groups but the last kPending ones.
template <int kPending>
__device__ inline void WaitForCopies() {
  __pipeline_wait_prior(kPending);
}

}  // namespace attn_deploy::cuda

#endif
