// Sums as levels: the end of every kernel that makes 8-bit maps. Included only by sources in kernels/.
#pragma once

#include "../activation.h"
#include "level_vectors.h"
#include "quantized_conv.h"
#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Whether the activation works on levels as well as on what they stand for, so that all scales are one.
constexpr bool IsPiecewise(Activation activation) {
  return activation == Activation::kNone || activation == Activation::kRelu;
}

// The least level: a ReLU cuts at that of 0.
constexpr float LeastLevel(Activation activation, uint8_t zero) {
  return activation == Activation::kRelu ? static_cast<float>(zero) : 0.0f;
}

// The activation of what is rounded to a level: one is at least 1/255 of the largest value.
template <Activation kActivation>
ATTN_DEPLOY_INLINE Vec ActivatedForLevels(Vec v) {
#if defined(__AVX512F__)
  if constexpr (kActivation == Activation::kSilu) {
    // v / (1 + 2^t), t = -v * log2(e) = floor(t) + r: the minimax fit of 2^r with a relative error of 1.7e-3, which is
    // 4e-4 of the result at most. Nine operations where exact ones and the division take 21: a third of the time of
    // EfficientNet's pointwise convolutions.
    const Vec t = Min(Broadcast(126.0f), v * Broadcast(-1.44269502f));
    const Vec r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
    const Vec power = Fma(Fma(Broadcast(0.33718965f), r, Broadcast(0.65763759f)), r, Broadcast(1.00172415f));
    return v * _mm512_rcp14_ps(Broadcast(1.0f) + _mm512_scalef_ps(power, t));
  }
#endif
  return Activated<kActivation>(v);
}

// sum: `sum * multiplier + bias (+ residual)`, see Requantization.
template <Activation kActivation>
ATTN_DEPLOY_INLINE Vec LevelOf(Vec sum, Vec inverse, float zero, float low) {
  if constexpr (!IsPiecewise(kActivation)) sum = Fma(ActivatedForLevels<kActivation>(sum), inverse, Broadcast(zero));
  return ClampLevel(sum, low);
}

// body(ActivationForm<activation>{}) for the activations that 8-bit maps have.
template <typename Body>
ATTN_DEPLOY_INLINE void WithMapActivation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kRelu:
      return body(ActivationForm<Activation::kRelu>{});
    case Activation::kSilu:
      return body(ActivationForm<Activation::kSilu>{});
    case Activation::kHardswish:
      return body(ActivationForm<Activation::kHardswish>{});
    default:
      return body(ActivationForm<Activation::kNone>{});
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
