// Activations on one float. Inlined into kernels' loops: branch-free, so that the compiler vectorizes them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace attn_deploy::native {

enum class Activation { kNone, kRelu, kSilu };

// exp(v) for v in [-87, 88], relative error below 1e-7 (8.6e-8 seen, every float tried). NaN gives NaN; what other v
// give is not specified.
inline float Exp(float v) {
  // v = n * ln(2) + r with |r| <= ln(2) / 2. ln(2) is split so that n * kLn2High is exact for |n| < 2^15.
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa, without SSE4's rounding instruction.
  constexpr float kRounder = 12582912.0f;
  const float shifted = v * kLog2E + kRounder;
  const float n = shifted - kRounder;
  const float r = (v - n * kLn2High) - n * kLn2Low;
  // exp(r) = 1 + r + r^2 * q(r); q is the minimax fit of the relative error on |r| <= ln(2) / 2, which is 3.6e-9.
  float q = 1.3814540e-3f;
  q = q * r + 8.3687451e-3f;
  q = q * r + 4.1668391e-2f;
  q = q * r + 1.6666520e-1f;
  q = q * r + 4.9999993e-1f;
  const float exp_r = 1.0f + (r + r * r * q);
  // 2^n from its bits. Unsigned, since NaN brings arbitrary bits here and must not overflow; multiplied rather than
  // added to the exponent, so that NaN stays NaN.
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return exp_r * power;
}

// max(v, 0). NaN gives NaN.
inline float Relu(float v) { return v < 0.0f ? 0.0f : v; }

// v / (1 + exp(-v)), relative error below 4e-7 (3.4e-7 seen, every float tried) where the result is not subnormal. NaN
// gives NaN; -infinity gives -0, the limit. Written with exp(-|v|), which cannot overflow, as the square of
// exp(-|v| / 2), which stays normal as far as the result does.
inline float Silu(float v) {
  // silu(-120) is below the smallest subnormal; clamping keeps -infinity from becoming infinity * 0.
  constexpr float kZeroBelow = -120.0f;
  const float clamped = v < kZeroBelow ? kZeroBelow : v;
  const float half = -0.5f * std::fabs(v);
  const float root = Exp(half < 0.5f * kZeroBelow ? 0.5f * kZeroBelow : half);
  const float scale = v < 0.0f ? root : 1.0f;
  return clamped / (1.0f + root * root) * scale * scale;
}

template <Activation kActivation>
inline float Activate(float v) {
  if constexpr (kActivation == Activation::kRelu) return Relu(v);
  if constexpr (kActivation == Activation::kSilu) return Silu(v);
  return v;
}

}  // namespace attn_deploy::native
