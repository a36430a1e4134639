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

// sum: `sum * multiplier + bias (+ residual)`, see Requantization.
template <Activation kActivation>
ATTN_DEPLOY_INLINE Vec LevelOf(Vec sum, Vec inverse, float zero, float low) {
  if constexpr (!IsPiecewise(kActivation)) sum = Fma(Activated<kActivation>(sum), inverse, Broadcast(zero));
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
