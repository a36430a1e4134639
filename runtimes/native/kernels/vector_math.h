// Elementary functions on vectors. Included only by sources in kernels/.
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// exp(v), relative error below 2 units in the last place for v in [-87.3, 88.3]. Below -87.7, -infinity included, 0
// where subnormals are flushed; above 88.4, infinity (AVX-512: above 88.7). NaN gives NaN.
ATTN_DEPLOY_INLINE Vec Exp(Vec v) {
  // v = n * ln(2) + r with |r| <= ln(2) / 2; ln(2) in two parts, so that n times the first is exact. The lower bound
  // gives n = -127, which makes the power 0, the upper one 128, which makes it infinite. NaN is the second operand,
  // which Max and Min return.
  v = Min(Broadcast(89.0f), Max(Broadcast(-88.0f), v));
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

// 2^(n + r), relative error below 2e-7, for whole numbers n in [-127, 128], r in [-1/2, 1/2]. NaN gives NaN.
ATTN_DEPLOY_INLINE Vec PowerOfTwo(Vec n, Vec r) {
  // The minimax fit of the relative error (9.1e-8), exact at 0.
  Vec q = Broadcast(1.32647271e-3f);
  q = Fma(q, r, Broadcast(9.67151264e-3f));
  q = Fma(q, r, Broadcast(5.55073374e-2f));
  q = Fma(q, r, Broadcast(2.40222421e-1f));
  q = Fma(q, r, Broadcast(6.93146978e-1f));
  q = Fma(q, r, Broadcast(1.0f));
  return ScaleByPowerOfTwo(q, n);
}

// 2^v for v in [-126, 126], relative error below 2e-7. NaN gives NaN.
ATTN_DEPLOY_INLINE Vec Exp2(Vec v) {
  const Vec n = RoundToNearest(v);
  return PowerOfTwo(n, v - n);
}

// 1 + exp(-v), relative error below 2.5e-7, for v of -89, which gives infinity, and more. NaN gives NaN. Five
// operations less than by Exp: a sixth of the time of an activation.
ATTN_DEPLOY_INLINE Vec OnePlusExpOfMinus(Vec v) {
  // exp(-v) = 2^(n + r); log2(e) in two parts, so that r is as exact as v.
  const Vec clamped = Min(Broadcast(88.0f), v);
  const Vec n = RoundToNearest(clamped * Broadcast(-1.44269502f));
  const Vec high = Fma(clamped, Broadcast(-1.44269502f), -n);
  return Broadcast(1.0f) + PowerOfTwo(n, Fma(clamped, Broadcast(-1.92596299e-8f), high));
}

// 1 / (1 + exp(-v)). NaN gives NaN.
ATTN_DEPLOY_INLINE Vec Sigmoid(Vec v) { return Broadcast(1.0f) / OnePlusExpOfMinus(Max(Broadcast(-89.0f), v)); }

// v * Sigmoid(v); -infinity gives -0, its limit. NaN gives NaN.
ATTN_DEPLOY_INLINE Vec Silu(Vec v) {
  v = Max(Broadcast(-89.0f), v);
  return v / OnePlusExpOfMinus(v);
}

// max(0, min(1, v / 6 + 1/2)), as torch.nn.Hardsigmoid has it. NaN gives NaN.
ATTN_DEPLOY_INLINE Vec HardSigmoid(Vec v) {
  return Min(Broadcast(1.0f), Max(Zero(), Fma(v, Broadcast(1.0f / 6.0f), Broadcast(0.5f))));
}

// GELU and its tanh approximation (Hendrycks and Gimpel 2016, section 2), errors below 1.3e-7 and 2.1e-7 of
// max(|v|, 1) (4 million floats of all sizes tried). Both are v * P(v) with P(v) + P(-v) = 1, so they are
// max(v, 0) - |v| * P(-|v|). log2(P(-a)) is smooth: a short polynomial in a, with weight on where |v| * P counts, is
// exact enough, and no branch, division or cancellation is left. -infinity gives a number near 0, its limit. NaN gives
// NaN.
ATTN_DEPLOY_INLINE Vec Gelu(Vec v) {
  const Vec a = Min(Broadcast(13.0f), Abs(v));  // 13 * P(-13) is 2^-120
  Vec log = Broadcast(2.52277538e-5f);
  log = Fma(log, a, Broadcast(-7.04499859e-4f));
  log = Fma(log, a, Broadcast(7.88055049e-3f));
  log = Fma(log, a, Broadcast(-5.31192926e-2f));
  log = Fma(log, a, Broadcast(-4.5897975e-1f));
  log = Fma(log, a, Broadcast(-1.15113525f));
  log = Fma(log, a, Broadcast(-1.0f));
  return NegFma(a, Exp2(log), Max(Zero(), v));
}

ATTN_DEPLOY_INLINE Vec GeluTanh(Vec v) {
  const Vec a = Min(Broadcast(8.0f), Abs(v));  // 8 * P(-8) is 2^-68
  Vec log = Broadcast(-1.9460349e-5f);
  log = Fma(log, a, Broadcast(3.44341949e-4f));
  log = Fma(log, a, Broadcast(-1.92460691e-3f));
  log = Fma(log, a, Broadcast(2.38594804e-3f));
  log = Fma(log, a, Broadcast(5.80955369e-3f));
  log = Fma(log, a, Broadcast(-5.09042725e-2f));
  log = Fma(log, a, Broadcast(-4.59206024e-1f));
  log = Fma(log, a, Broadcast(-1.15113111f));
  log = Fma(log, a, Broadcast(-1.0f));
  return NegFma(a, Exp2(log), Max(Zero(), v));
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
