#include "gate.h"

#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// x * gate [+ residual] of `count` lanes.
template <bool kHasResidual>
ATTN_DEPLOY_INLINE Vec Gated(Vec x, Vec gate, Vec residual) {
  if constexpr (kHasResidual) return Fma(x, gate, residual);
  return x * gate;
}

// One contiguous row. `gate` points at `count` values, or at one that holds for the whole row when kGateRepeats.
template <Activation kActivation, bool kHasResidual, bool kGateRepeats>
void GateRow(const float* x, const float* gate, const float* residual, float* output, int64_t count) {
  const Vec row_gate = Broadcast(*gate);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = Gated<kHasResidual>(Load(x + i), kGateRepeats ? row_gate : Load(gate + i),
                                      kHasResidual ? Load(residual + i) : Zero());
    Store(output + i, Activated<kActivation>(v));
  }
  if (i == count) return;
  const int64_t rest = count - i;
  const Vec v = Gated<kHasResidual>(LoadPartial(x + i, rest), kGateRepeats ? row_gate : LoadPartial(gate + i, rest),
                                    kHasResidual ? LoadPartial(residual + i, rest) : Zero());
  StorePartial(output + i, Activated<kActivation>(v), rest);
}

// GateRow for one form and one kind of row.
using RowFunction = void (*)(const float*, const float*, const float*, float*, int64_t);

RowFunction PickRow(Activation activation, bool has_residual, bool gate_repeats) {
  RowFunction row = nullptr;
  WithActivation(activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    if (has_residual) {
      row = gate_repeats ? GateRow<kActivation, true, true> : GateRow<kActivation, true, false>;
    } else {
      row = gate_repeats ? GateRow<kActivation, false, true> : GateRow<kActivation, false, false>;
    }
  });
  return row;
}

}  // namespace

void RunGate(const GatePlan& plan, Activation activation, const GateArrays& arrays, int64_t begin, int64_t end) {
  if (begin >= end) return;  // also keeps an extent of 0 out of the divisions below
  const int inner = plan.rank - 1;
  const RowFunction row =
      PickRow(activation, arrays.residual != nullptr, /*gate_repeats=*/plan.gate_strides[inner] == 0);

  // `index` is the position of flat element `at`, `gate` the offset of the gate value that belongs to it.
  int64_t index[kMaxRank];
  int64_t gate = 0;
  int64_t rest = begin;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % plan.extents[d];
    rest /= plan.extents[d];
    gate += index[d] * plan.gate_strides[d];
  }

  for (int64_t at = begin; at < end;) {
    const int64_t count = Minimum(plan.extents[inner] - index[inner], end - at);
    row(arrays.x + at, arrays.gate + gate, arrays.residual == nullptr ? nullptr : arrays.residual + at,
        arrays.output + at, count);
    at += count;

    gate -= index[inner] * plan.gate_strides[inner];
    index[inner] = 0;
    for (int d = inner - 1; d >= 0; --d) {
      gate += plan.gate_strides[d];
      if (++index[d] < plan.extents[d]) break;
      gate -= plan.extents[d] * plan.gate_strides[d];
      index[d] = 0;
    }
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
