// Activations on vectors. Included only by sources in kernels/.
#pragma once

#include "../activation.h"
#include "vector_math.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// activation(v). NaN gives NaN.
template <Activation kActivation>
ATTN_DEPLOY_INLINE Vec Activated(Vec v) {
  if constexpr (kActivation == Activation::kRelu) return Max(Zero(), v);  // NaN stays
  if constexpr (kActivation == Activation::kSilu) return Silu(v);
  if constexpr (kActivation == Activation::kGelu) return Gelu(v);
  if constexpr (kActivation == Activation::kGeluTanh) return GeluTanh(v);
  if constexpr (kActivation == Activation::kHardswish) return Max(Broadcast(-3.0f), v) * HardSigmoid(v);  // 0 at -inf
  if constexpr (kActivation == Activation::kSigmoid) return Sigmoid(v);
  if constexpr (kActivation == Activation::kHardSigmoid) return HardSigmoid(v);
  return v;
}

template <Activation kActivation>
struct ActivationForm {
  static constexpr Activation value = kActivation;
};

// body(ActivationForm<activation>{}), so that a loop is compiled once per activation.
template <typename Body>
ATTN_DEPLOY_INLINE void WithActivation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone:
      return body(ActivationForm<Activation::kNone>{});
    case Activation::kRelu:
      return body(ActivationForm<Activation::kRelu>{});
    case Activation::kSilu:
      return body(ActivationForm<Activation::kSilu>{});
    case Activation::kGelu:
      return body(ActivationForm<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(ActivationForm<Activation::kGeluTanh>{});
    case Activation::kHardswish:
      return body(ActivationForm<Activation::kHardswish>{});
    case Activation::kSigmoid:
      return body(ActivationForm<Activation::kSigmoid>{});
    case Activation::kHardSigmoid:
      return body(ActivationForm<Activation::kHardSigmoid>{});
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
