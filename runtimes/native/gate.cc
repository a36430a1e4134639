#include "gate.h"

#include <algorithm>

namespace attn_deploy::native {
namespace {

// One contiguous row. `gate` points at `count` values, or at one that holds for the whole row when kGateRepeats.
template <Activation kActivation, bool kHasResidual, bool kGateRepeats>
void GateRow(const float* __restrict x, const float* __restrict gate, const float* __restrict residual,
             float* __restrict output, int64_t count) {
  const float row_gate = *gate;
  for (int64_t i = 0; i < count; ++i) {
    float v = x[i] * (kGateRepeats ? row_gate : gate[i]);
    if constexpr (kHasResidual) v += residual[i];
    output[i] = Activate<kActivation>(v);
  }
}

// GateRow for one form and one kind of row.
using RowFunction = void (*)(const float*, const float*, const float*, float*, int64_t);

template <Activation kActivation>
RowFunction PickRow(bool has_residual, bool gate_repeats) {
  if (has_residual) return gate_repeats ? GateRow<kActivation, true, true> : GateRow<kActivation, true, false>;
  return gate_repeats ? GateRow<kActivation, false, true> : GateRow<kActivation, false, false>;
}

RowFunction PickRow(Activation activation, bool has_residual, bool gate_repeats) {
  switch (activation) {
    case Activation::kRelu:
      return PickRow<Activation::kRelu>(has_residual, gate_repeats);
    case Activation::kSilu:
      return PickRow<Activation::kSilu>(has_residual, gate_repeats);
    case Activation::kNone:
      break;
  }
  return PickRow<Activation::kNone>(has_residual, gate_repeats);
}

}  // namespace

bool GateBroadcasts(const Shape& x, const Shape& gate) {
  if (gate.rank != x.rank) return false;
  for (int64_t d = 0; d < x.rank; ++d) {
    if (gate.dims[d] != x.dims[d] && gate.dims[d] != 1) return false;
  }
  return true;
}

GatePlan PlanGate(const Shape& x, const Shape& gate) {
  // From the innermost dim outwards, so `reversed` has its dims the other way round. A dim of 1 belongs to any
  // neighbour and is dropped.
  GatePlan reversed;
  reversed.rank = 0;
  reversed.size = 1;
  int64_t gate_size = 1;
  for (int64_t d = x.rank - 1; d >= 0; --d) {
    const int64_t extent = x.dims[d];
    reversed.size *= extent;
    if (extent == 1) continue;
    const bool repeats = gate.dims[d] == 1;
    const int last = reversed.rank - 1;
    if (last >= 0 && repeats == (reversed.gate_strides[last] == 0)) {
      reversed.extents[last] *= extent;
    } else {
      reversed.extents[reversed.rank] = extent;
      reversed.gate_strides[reversed.rank] = repeats ? 0 : gate_size;
      ++reversed.rank;
    }
    if (!repeats) gate_size *= extent;
  }
  if (reversed.rank == 0) {  // one element
    reversed.rank = 1;
    reversed.extents[0] = 1;
    reversed.gate_strides[0] = 0;
  }
  GatePlan plan = reversed;
  std::reverse(plan.extents, plan.extents + plan.rank);
  std::reverse(plan.gate_strides, plan.gate_strides + plan.rank);
  return plan;
}

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
    const int64_t count = std::min(plan.extents[inner] - index[inner], end - at);
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

}  // namespace attn_deploy::native
