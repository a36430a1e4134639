// Activations on vectors. Included only by sources in kernels/.
#pragma once

#include "../activation.h"
#include "vector_math.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

template <Activation kActivation>
ATTN_DEPLOY_INLINE Vec Activated(Vec v) {
  if constexpr (kActivation == Activation::kRelu) return Max(Zero(), v);  // NaN stays
  if constexpr (kActivation == Activation::kSilu) return v / (Broadcast(1.0f) + Exp(Zero() - v));
  return v;
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
