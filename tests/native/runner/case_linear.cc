// Cases of the kernel RunLinear: ints {activation, normalizes, rows, in, out, x_stride, residual_stride, y_stride},
// floats {epsilon}, inputs {x [(rows - 1) * x_stride + in], weight [in, out], bias [out], residual (if residual_stride
// > 0)}, output y, (rows - 1) * y_stride + out floats of which those between the rows stay as they were.
#include <cstdlib>
#include <memory>

#include "case.h"
#include "kernels/linear.h"

namespace attn_deploy::native::runner {

// Memory at a cache line, as the kernels' packed weights and scratch are promised to be.
std::unique_ptr<float, void (*)(void*)> AlignedFloats(int64_t count) {
  const auto bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  return {static_cast<float*>(std::aligned_alloc(64, bytes)), std::free};
}

namespace {

std::vector<Array> RunCase(const Case& c) {
  LinearPlan plan;
  plan.activation = static_cast<Activation>(c.ints.at(0));
  plan.normalizes = c.ints.at(1) != 0;
  plan.rows = c.ints.at(2);
  plan.in = c.ints.at(3);
  plan.out = c.ints.at(4);
  plan.epsilon = static_cast<float>(c.floats.at(0));
  ATTN_DEPLOY_KERNEL(PlanLinear)(&plan);

  const auto packed = AlignedFloats(ATTN_DEPLOY_KERNEL(PackedWeightsSize)(plan.in, plan.out));
  ATTN_DEPLOY_KERNEL(PackWeights)(c.inputs.at(1).floats(), c.inputs.at(2).floats(), plan.in, plan.out, packed.get());
  LinearArrays arrays;
  arrays.x = c.inputs.at(0).floats();
  arrays.x_stride = c.ints.at(5);
  arrays.weights = {packed.get(), plan.in, plan.out};
  arrays.residual_stride = c.ints.at(6);
  if (arrays.residual_stride > 0) arrays.residual = c.inputs.at(3).floats();
  arrays.y_stride = c.ints.at(7);
  std::vector<Array> outputs;
  const int64_t size = plan.rows > 0 ? (plan.rows - 1) * arrays.y_stride + plan.out : 0;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{size}, 1);
  arrays.y = outputs[0].floats();
  const auto scratch = AlignedFloats(plan.scratch);
  // Last block first: their order does not matter.
  for (int64_t block = plan.blocks(); block-- > 0;) {
    ATTN_DEPLOY_KERNEL(RunLinear)(plan, arrays, block, scratch.get());
  }
  return outputs;
}

const Registered kRegistered("linear", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
