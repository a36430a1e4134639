// Sums that stay accurate over many terms. Included only by sources in kernels/.
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// A sum and what its roundings lost (Knuth's TwoSum; The Art of Computer Programming, volume 2, 4.2.2), so that adding
// n terms costs a few roundings instead of n. Two instructions' worth more when fed with sums of a few terms each.
struct CompensatedSum {
  Vec sum = Zero();
  Vec lost = Zero();

  __attribute__((always_inline)) void Add(Vec term) {
    const Vec next = sum + term;
    const Vec added = next - sum;
    lost = lost + ((sum - (next - added)) + (term - added));
    sum = next;
  }
  // The sum itself where it is not finite: what it lost is then no number.
  __attribute__((always_inline)) Vec Total() const {
    const Vec total = sum + lost;
    return IfLess(Abs(total), Broadcast(__builtin_inff()), total, sum);
  }
};

// The four sums as one.
ATTN_DEPLOY_INLINE Vec AddFour(const Vec (&v)[4]) { return (v[0] + v[1]) + (v[2] + v[3]); }

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
