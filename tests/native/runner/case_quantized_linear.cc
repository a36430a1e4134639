// Cases of the kernel RunQuantizedLinear: ints {activation, normalizes, rows, in, out, x_stride, residual_stride,
// y_stride}, floats {epsilon}, inputs {x [(rows - 1) * x_stride + in], weight uint8 [in, out], weight_scale [out], bias
// [out], norm_scale and norm_bias [in] (if it normalizes), residual (if residual_stride > 0)}, output y as case_linear.cc
// has it.
#include "case.h"
#include "kernels/quantized_linear.h"
#include "quantized_input.h"

namespace attn_deploy::native::runner {
namespace {

std::vector<Array> RunCase(const Case& c) {
  QuantizedLinearPlan plan;
  plan.activation = static_cast<Activation>(c.ints.at(0));
  plan.normalizes = c.ints.at(1) != 0;
  plan.rows = c.ints.at(2);
  plan.in = c.ints.at(3);
  plan.out = c.ints.at(4);
  plan.epsilon = static_cast<float>(c.floats.at(0));
  ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedLinear)(&plan);

  AlignedBuffer packed, scratch;
  QuantizedLinearArrays arrays;
  arrays.x = c.inputs.at(0).floats();
  arrays.x_stride = c.ints.at(5);
  arrays.weights = PackedInput(c, 1, 1, &packed);
  if (plan.normalizes) {
    arrays.norm_scale = c.inputs.at(4).floats();
    arrays.norm_bias = c.inputs.at(5).floats();
  }
  arrays.residual_stride = c.ints.at(6);
  if (arrays.residual_stride > 0) arrays.residual = c.inputs.back().floats();
  arrays.y_stride = c.ints.at(7);
  std::vector<Array> outputs;
  const int64_t size = plan.rows > 0 ? (plan.rows - 1) * arrays.y_stride + plan.out : 0;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{size}, 1);
  arrays.y = outputs[0].floats();
  // Last block first: their order does not matter.
  for (int64_t block = plan.blocks(); block-- > 0;) {
    ATTN_DEPLOY_INT8_KERNEL(RunQuantizedLinear)(plan, arrays, block, scratch.Floats(plan.scratch));
  }
  return outputs;
}

const Registered kRegistered("quantized_linear", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
