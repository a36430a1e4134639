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

// `rows` contiguous rows of `count`. `gate` points at the first row's `count` values, or at one that holds for the whole
// row when kGateRepeats; the next row's are `gate_step` further.
template <Activation kActivation, bool kHasResidual, bool kGateRepeats>
void GateRows(const float* x, const float* gate, const float* residual, float* output, int64_t count, int64_t rows,
              int64_t gate_step) {
  for (int64_t row = 0; row < rows; ++row, gate += gate_step) {
    const Vec row_gate = Broadcast(*gate);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec v = Gated<kHasResidual>(Load(x + i), kGateRepeats ? row_gate : Load(gate + i),
                                        kHasResidual ? Load(residual + i) : Zero());
      Store(output + i, Activated<kActivation>(v));
    }
    if (i < count) {
      const int64_t rest = count - i;
      const Vec v =
          Gated<kHasResidual>(LoadPartial(x + i, rest), kGateRepeats ? row_gate : LoadPartial(gate + i, rest),
                              kHasResidual ? LoadPartial(residual + i, rest) : Zero());
      StorePartial(output + i, Activated<kActivation>(v), rest);
    }
    x += count;
    output += count;
    if constexpr (kHasResidual) residual += count;
  }
}

// GateRows for one form and one kind of row.
using RowsFunction = void (*)(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t);

RowsFunction PickRows(Activation activation, bool has_residual, bool gate_repeats) {
  RowsFunction rows = nullptr;
  WithActivation(activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    if (has_residual) {
      rows = gate_repeats ? GateRows<kActivation, true, true> : GateRows<kActivation, true, false>;
    } else {
      rows = gate_repeats ? GateRows<kActivation, false, true> : GateRows<kActivation, false, false>;
    }
  });
  return rows;
}

}  // namespace

void RunGate(const GatePlan& plan, Activation activation, const GateArrays& arrays, int64_t begin, int64_t end) {
  if (begin >= end) return;  // also keeps an extent of 0 out of the divisions below
  const int inner = plan.rank - 1;
  const RowsFunction run =
      PickRows(activation, arrays.residual != nullptr, /*gate_repeats=*/plan.gate_strides[inner] == 0);

  // `index` is the position of flat element `at`, `gate` the offset of the gate value that belongs to it.
  int64_t index[kMaxRank];
  int64_t gate = 0;
  int64_t rest = begin;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % plan.extents[d];
    rest /= plan.extents[d];
    gate += index[d] * plan.gate_strides[d];
  }

  const int64_t width = plan.extents[inner];
  for (int64_t at = begin; at < end;) {
    // Whole rows as far as the gate advances evenly; parts of a row where the range starts or ends inside one.
    int64_t rows = 1;
    if (inner > 0 && index[inner] == 0) {
      rows = Maximum(Minimum(plan.extents[inner - 1] - index[inner - 1], (end - at) / width), 1);
    }
    const int64_t count = Minimum(width - index[inner], end - at);
    run(arrays.x + at, arrays.gate + gate, arrays.residual == nullptr ? nullptr : arrays.residual + at,
        arrays.output + at, count, rows, inner > 0 ? plan.gate_strides[inner - 1] : 0);
    at += rows * count;

    if (inner == 0) return;
    gate += rows * plan.gate_strides[inner - 1] - index[inner] * plan.gate_strides[inner];
    index[inner] = 0;
    index[inner - 1] += rows;
    for (int d = inner - 1; d > 0 && index[d] == plan.extents[d]; --d) {
      gate += plan.gate_strides[d - 1] - plan.extents[d] * plan.gate_strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
