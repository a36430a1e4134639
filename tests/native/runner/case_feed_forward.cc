// Cases of the kernel RunFeedForward: ints {activation, rows, channels, hidden, x_stride, y_stride}, floats {epsilon},
// inputs {x, weight1 [channels, hidden], bias1, weight2 [hidden, channels], bias2}, output y as case_linear.cc has it.
#include <cstdlib>
#include <memory>

#include "case.h"
#include "kernels/feed_forward.h"

namespace attn_deploy::native::runner {

std::unique_ptr<float, void (*)(void*)> AlignedFloats(int64_t count);

namespace {

std::vector<Array> RunCase(const Case& c) {
  FeedForwardPlan plan;
  plan.activation = static_cast<Activation>(c.ints.at(0));
  plan.rows = c.ints.at(1);
  plan.channels = c.ints.at(2);
  plan.hidden = c.ints.at(3);
  plan.epsilon = static_cast<float>(c.floats.at(0));
  ATTN_DEPLOY_KERNEL(PlanFeedForward)(&plan);

  const auto pack = ATTN_DEPLOY_KERNEL(PackWeights);
  const auto size_of = ATTN_DEPLOY_KERNEL(PackedWeightsSize);
  const auto packed1 = AlignedFloats(size_of(plan.channels, plan.hidden));
  const auto packed2 = AlignedFloats(size_of(plan.hidden, plan.channels));
  pack(c.inputs.at(1).floats(), c.inputs.at(2).floats(), plan.channels, plan.hidden, packed1.get());
  pack(c.inputs.at(3).floats(), c.inputs.at(4).floats(), plan.hidden, plan.channels, packed2.get());
  FeedForwardArrays arrays;
  arrays.x = c.inputs.at(0).floats();
  arrays.x_stride = c.ints.at(4);
  arrays.weights1 = {packed1.get(), plan.channels, plan.hidden};
  arrays.weights2 = {packed2.get(), plan.hidden, plan.channels};
  arrays.y_stride = c.ints.at(5);
  std::vector<Array> outputs;
  const int64_t size = plan.rows > 0 ? (plan.rows - 1) * arrays.y_stride + plan.channels : 0;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{size}, 1);
  arrays.y = outputs[0].floats();
  const auto scratch = AlignedFloats(plan.scratch);
  for (int64_t block = plan.blocks; block-- > 0;) {
    ATTN_DEPLOY_KERNEL(RunFeedForward)(plan, arrays, block, scratch.get());
  }
  return outputs;
}

const Registered kRegistered("feed_forward", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
