// Elementary functions on vectors. Included only by sources in kernels/.
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// exp(v), relative error below 2 units in the last place for v in [-87.3, 88.3]. Below, 0 or the smallest normal
// number; above, about 2.6e38. -infinity gives at most 1.2e-38. NaN is clamped too: callers that keep NaN add it.
ATTN_DEPLOY_INLINE Vec Exp(Vec v) {
  // v = n * ln(2) + r with |r| <= ln(2) / 2; ln(2) in two parts, so that n times the first is exact.
  v = Min(Max(v, Broadcast(-87.3365f)), Broadcast(88.3762f));
  const Vec n = RoundToNearest(v * Broadcast(1.44269504f));
  Vec r = NegFma(n, Broadcast(0.693359375f), v);
  r = NegFma(n, Broadcast(-2.12194440e-4f), r);
  // exp(r) = 1 + r + r^2 * q(r), q the minimax fit of the relative error on |r| <= ln(2) / 2 (3.6e-9).
  Vec q = Broadcast(1.3814540e-3f);
  q = Fma(q, r, Broadcast(8.3687451e-3f));
  q = Fma(q, r, Broadcast(4.1668391e-2f));
  q = Fma(q, r, Broadcast(1.6666520e-1f));
  q = Fma(q, r, Broadcast(4.9999993e-1f));
  const Vec exp_r = Fma(r * r, q, r) + Broadcast(1.0f);
  return ScaleByPowerOfTwo(exp_r, n);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
