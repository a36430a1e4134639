// Cases of the kernel RunGate: ints {activation, pieces}, inputs {x, gate[, residual]}, output like x. The tensor is
// cut into `pieces` ranges, as threads do.
#include "case.h"
#include "kernels/gate.h"

namespace attn_deploy::native::runner {
namespace {

Shape ShapeOf(const Array& array) {
  Shape shape;
  shape.rank = static_cast<int64_t>(array.dims.size());
  for (size_t d = 0; d < array.dims.size(); ++d) shape.dims[d] = array.dims[d];
  return shape;
}

std::vector<Array> RunCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  const Array& gate = c.inputs.at(1);
  if (!GateBroadcasts(ShapeOf(x), ShapeOf(gate))) Reject("the gate does not fit x");
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, x.dims, 1);
  const GateArrays arrays = {x.floats(), gate.floats(), c.inputs.size() > 2 ? c.inputs[2].floats() : nullptr,
                             outputs[0].floats()};
  const GatePlan plan = PlanGate(ShapeOf(x), ShapeOf(gate));
  const int64_t pieces = c.ints.at(1);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    ATTN_DEPLOY_KERNEL(RunGate)
    (plan, static_cast<Activation>(c.ints.at(0)), arrays, piece * plan.size / pieces, (piece + 1) * plan.size / pieces);
  }
  return outputs;
}

const Registered kRegistered("gate", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
