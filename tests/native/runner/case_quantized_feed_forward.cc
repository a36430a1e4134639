// Cases of the kernel RunQuantizedFeedForward: ints {activation, rows, channels, hidden, groups, x_stride, y_stride},
// floats {epsilon}, inputs as those of the QuantizedFeedForward forms, output y as case_linear.cc has it.

#include "case.h"
#include "kernels/quantized_feed_forward.h"
#include "quantized_input.h"

namespace attn_deploy::native::runner {
namespace {

std::vector<Array> RunCase(const Case& c) {
  QuantizedFeedForwardPlan plan;
  plan.activation = static_cast<Activation>(c.ints.at(0));
  plan.rows = c.ints.at(1);
  plan.channels = c.ints.at(2);
  plan.hidden = c.ints.at(3);
  plan.groups = c.ints.at(4);
  plan.epsilon = static_cast<float>(c.floats.at(0));
  ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedFeedForward)(&plan);

  AlignedBuffer packed1, packed2, scratch;
  QuantizedFeedForwardArrays arrays;
  arrays.x = c.inputs.at(0).floats();
  arrays.x_stride = c.ints.at(5);
  arrays.norm_scale = c.inputs.at(1).floats();
  arrays.norm_bias = c.inputs.at(2).floats();
  arrays.weights1 = PackedInput(c, 3, 1, &packed1);
  arrays.weights2 = PackedInput(c, 6, plan.groups, &packed2);
  arrays.y_stride = c.ints.at(6);
  std::vector<Array> outputs;
  const int64_t size = plan.rows > 0 ? (plan.rows - 1) * arrays.y_stride + plan.channels : 0;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{size}, 1);
  arrays.y = outputs[0].floats();
  for (int64_t block = plan.blocks; block-- > 0;) {
    ATTN_DEPLOY_INT8_KERNEL(RunQuantizedFeedForward)(plan, arrays, block, scratch.Floats(plan.scratch));
  }
  return outputs;
}

const Registered kRegistered("quantized_feed_forward", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
