// Cases of the kernels RunQuantizedConv and RunQuantizedDepthwise: ints {stride, pad_top, pad_left, out_height, out_width,
// x_zero, y_zero, activation}, inputs {x [height, width, in], weight [out, kernel_height, kernel_width, in], multiplier,
// bias, residual_multiplier, inverse, all [out][, residual]}, output y [out_height, out_width, out].
#include <cstring>

#include "case.h"
#include "kernels/quantized_conv.h"
#include "kernels/quantized_depthwise.h"
#include "scratch.h"

namespace attn_deploy::native::runner {
namespace {

const uint8_t* Bytes(const Array& array) { return reinterpret_cast<const uint8_t*>(array.bytes()); }

QuantizedConvPlan PlanOf(const Case& c) {
  const Array& x = c.inputs.at(0);
  const Array& weight = c.inputs.at(1);
  QuantizedConvPlan plan;
  plan.height = x.dims.at(0);
  plan.width = x.dims.at(1);
  plan.in = x.dims.at(2);
  plan.out = weight.dims.at(0);
  plan.kernel_height = weight.dims.at(1);
  plan.kernel_width = weight.dims.at(2);
  plan.stride = c.ints.at(0);
  plan.pad_top = c.ints.at(1);
  plan.pad_left = c.ints.at(2);
  plan.out_height = c.ints.at(3);
  plan.out_width = c.ints.at(4);
  plan.x_zero = static_cast<uint8_t>(c.ints.at(5));
  plan.y_zero = static_cast<uint8_t>(c.ints.at(6));
  plan.activation = static_cast<Activation>(c.ints.at(7));
  plan.has_residual = c.inputs.size() > 6;
  return plan;
}

template <bool kDepthwise>
std::vector<Array> RunCase(const Case& c) {
  QuantizedConvPlan plan = PlanOf(c);
  const Requantization requantization = {c.inputs.at(2).floats(), c.inputs.at(3).floats(), c.inputs.at(4).floats(),
                                         c.inputs.at(5).floats()};
  const uint8_t* weight = Bytes(c.inputs.at(1));
  AlignedBuffer packed, scratch;
  const int64_t depth = plan.kernel_height * plan.kernel_width * plan.in;
  float* to = nullptr;
  if (kDepthwise) {
    to = packed.Floats(ATTN_DEPLOY_INT8_KERNEL(QuantizedDepthwiseSize)(plan.kernel_height, plan.out));
    ATTN_DEPLOY_INT8_KERNEL(PackQuantizedDepthwise)(weight, requantization, plan.kernel_height, plan.out, to);
    ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedDepthwise)(&plan);
  } else {
    to = packed.Floats((ATTN_DEPLOY_INT8_KERNEL(QuantizedConvSize)(depth, plan.out) + 3) / 4);
    ATTN_DEPLOY_INT8_KERNEL(PackQuantizedConv)(weight, requantization, plan.x_zero, depth, plan.out, to);
    ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedConv)(&plan);
  }
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kUint8, std::vector<int64_t>{plan.out_height, plan.out_width, plan.out}, 1);
  const QuantizedConvArrays arrays = {Bytes(c.inputs.at(0)), to, plan.has_residual ? Bytes(c.inputs.at(6)) : nullptr,
                                      reinterpret_cast<uint8_t*>(outputs[0].bytes())};
  for (int64_t block = plan.blocks() - 1; block >= 0; --block) {
    if (kDepthwise) {
      ATTN_DEPLOY_INT8_KERNEL(RunQuantizedDepthwise)(plan, arrays, block, scratch.Floats(plan.scratch));
    } else {
      ATTN_DEPLOY_INT8_KERNEL(RunQuantizedConv)(plan, arrays, block, scratch.Floats(plan.scratch));
    }
  }
  return outputs;
}

const Registered kConv("quantized_conv", RunCase<false>);
const Registered kDepthwise("quantized_depthwise", RunCase<true>);

}  // namespace
}  // namespace attn_deploy::native::runner
