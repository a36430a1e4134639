// In the place of device.cuh: the same names, for the host. Tensor-core operations gather their warp and follow the
// layouts that the PTX manual gives for them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda_runtime_api.h"
#include "simulator.h"

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)

using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

inline void __syncthreads() { emulation::Barrier(); }
inline void __syncwarp() {
  emulation::Meet("__syncwarp", nullptr, [](void* const (&)[emulation::kLanes]) {});
}

inline float __shfl_xor_sync(uint32_t, float value, int distance) {
  struct Lane {
    float value;
    int distance;
    float result;
  } mine = {value, distance, 0.0f};
  emulation::Meet("__shfl_xor_sync", &mine, [](void* const (&lanes)[emulation::kLanes]) {
    for (int l = 0; l < emulation::kLanes; ++l) {
      auto* lane = static_cast<Lane*>(lanes[l]);
      lane->result = static_cast<Lane*>(lanes[l ^ lane->distance])->value;
    }
  });
  return mine.result;
}

namespace attn_deploy::cuda {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

namespace emulated {

template <typename To, typename From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint16_t HalfBits(float v) {
  const uint32_t bits = BitCast<uint32_t>(v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: next to 0.5 a float's last bit is worth 2^-24, as a half's is here, so that the sum is rounded right.
    const float sum = BitCast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (BitCast<uint32_t>(sum) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

inline float HalfValue(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 0x1fu;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return BitCast<float>(sign | BitCast<uint32_t>(magnitude));
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + 112;
  return BitCast<float>(sign | wide << 23 | fraction << 13);
}

inline uint16_t Bfloat16Bits(float v) {
  const uint32_t bits = BitCast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace emulated

inline float ToFloat(float v) { return v; }
inline float ToFloat(Half v) { return emulated::HalfValue(v.bits); }
inline float ToFloat(Bfloat16 v) { return emulated::BitCast<float>(static_cast<uint32_t>(v.bits) << 16); }

template <typename T>
T FromFloat(float v);
template <>
inline float FromFloat<float>(float v) {
  return v;
}
template <>
inline Half FromFloat<Half>(float v) {
  return {emulated::HalfBits(v)};
}
template <>
inline Bfloat16 FromFloat<Bfloat16>(float v) {
  return {emulated::Bfloat16Bits(v)};
}

template <typename T>
uint32_t Pack(float low, float high) {
  return FromFloat<T>(low).bits | static_cast<uint32_t>(FromFloat<T>(high).bits) << 16;
}

template <typename T>
float2 Unpack(uint32_t pair) {
  return {ToFloat(T{static_cast<uint16_t>(pair)}), ToFloat(T{static_cast<uint16_t>(pair >> 16)})};
}

inline float Exp2(float v) {
  const float power = std::exp2(v);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
}

inline unsigned char* SharedMemory() { return emulation::SharedMemory(); }

namespace emulated {

struct MatricesLane {
  const void* row;
  uint32_t (*parts)[4];
};

inline uint16_t MatrixElement(void* const (&lanes)[emulation::kLanes], int matrix, int row, int column) {
  const void* address = static_cast<MatricesLane*>(lanes[8 * matrix + row])->row;
  return static_cast<const uint16_t*>(address)[column];
}

template <bool kTransposed>
void LoadMatricesOfWarp(void* const (&lanes)[emulation::kLanes]) {
  for (int l = 0; l < emulation::kLanes; ++l) {
    for (int m = 0; m < 4; ++m) {
      const int outer = l / 4;
      const int inner = l % 4 * 2;
      const uint32_t low = kTransposed ? MatrixElement(lanes, m, inner, outer) : MatrixElement(lanes, m, outer, inner);
      const uint32_t high =
          kTransposed ? MatrixElement(lanes, m, inner + 1, outer) : MatrixElement(lanes, m, outer, inner + 1);
      (*static_cast<MatricesLane*>(lanes[l])->parts)[m] = low | high << 16;
    }
  }
}

struct MultiplyLane {
  float (*sum)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};

// m16n8k16 from the whole warp's registers; sums in FP32, one product after the other.
template <typename T>
void MultiplyOfWarp(void* const (&lanes)[emulation::kLanes]) {
  float a[16][16];
  float b[16][8];
  for (int l = 0; l < emulation::kLanes; ++l) {
    const auto* lane = static_cast<const MultiplyLane*>(lanes[l]);
    const int group = l / 4;
    const int column = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Unpack<T>((*lane->a)[i]);
      a[group + i % 2 * 8][column + i / 2 * 8] = pair.x;
      a[group + i % 2 * 8][column + i / 2 * 8 + 1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 pair = Unpack<T>(lane->b[i]);
      b[column + 8 * i][group] = pair.x;
      b[column + 8 * i + 1][group] = pair.y;
    }
  }
  for (int l = 0; l < emulation::kLanes; ++l) {
    float(&sum)[4] = *static_cast<MultiplyLane*>(lanes[l])->sum;
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 16; ++k) sum[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
    }
  }
}

}  // namespace emulated

inline void LoadMatrices(uint32_t (&parts)[4], const void* row) {
  emulation::RequireAlignment(row, "a row of ldmatrix is not aligned");
  emulated::MatricesLane mine = {row, &parts};
  emulation::Meet("ldmatrix", &mine, emulated::LoadMatricesOfWarp<false>);
}

inline void LoadMatricesTransposed(uint32_t (&parts)[4], const void* row) {
  emulation::RequireAlignment(row, "a row of ldmatrix is not aligned");
  emulated::MatricesLane mine = {row, &parts};
  emulation::Meet("ldmatrix.trans", &mine, emulated::LoadMatricesOfWarp<true>);
}

template <typename T>
void MultiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::MultiplyLane mine = {&sum, &a, {b0, b1}};
  emulation::Meet("mma", &mine, emulated::MultiplyOfWarp<T>);
}

inline void CopyAsync(void* shared, const void* global) { emulation::CopyAsync(shared, global); }
inline void CommitCopies() { emulation::CommitCopies(); }
template <int kPending>
void WaitForCopies() {
  emulation::WaitForCopies(kPending);
}

}  // namespace attn_deploy::cuda
