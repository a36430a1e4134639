#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/gate.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct GateForm {
  const char* name;  // of the ONNX operator
  Activation activation;
  bool has_residual;
};

constexpr GateForm kForms[] = {
    {"Gate", Activation::kNone, false},          {"GateRelu", Activation::kRelu, false},
    {"GateSilu", Activation::kSilu, false},      {"GateResidual", Activation::kNone, true},
    {"GateResidualRelu", Activation::kRelu, true}, {"GateResidualSilu", Activation::kSilu, true},
};

// Elements of a block of work, and up to which one thread does it all: about 2 and 5 us, what waking a thread takes.
// Multiples of 16, so that two threads do not write to one cache line.
constexpr int64_t ElementsPerBlock(Activation activation) { return activation == Activation::kSilu ? 8192 : 16384; }

class GateKernel : public Kernel {
 public:
  GateKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(*static_cast<const GateForm*>(op.form)) {}

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  // Everything that RunGate takes for granted.
  OrtStatus* Check(const std::vector<InputTensor>& inputs) const;

  const GateForm& form_;
};

OrtStatus* GateKernel::Check(const std::vector<InputTensor>& inputs) const {
  const Shape& x = inputs[0].shape;
  const Shape& gate = inputs[1].shape;
  if (x.rank < 1) return Fail("x has shape []; expected rank 1 to " + std::to_string(kMaxRank));
  if (!GateBroadcasts(x, gate)) {
    return Fail("gate has shape " + ToString(gate) + ", x has " + ToString(x) +
                "; expected a gate of x's rank, every dim x's or 1");
  }
  if (form_.has_residual && inputs[2].shape != x) {
    return Fail("residual has shape " + ToString(inputs[2].shape) + ", x has " + ToString(x) +
                "; expected a residual of x's shape");
  }
  return nullptr;
}

OrtStatus* GateKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  ATTN_DEPLOY_RETURN_IF_ERROR(Check(inputs));
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, inputs[0].shape, &output));

  const GatePlan plan = PlanGate(inputs[0].shape, inputs[1].shape);
  const GateArrays arrays = {static_cast<const float*>(inputs[0].data), static_cast<const float*>(inputs[1].data),
                             form_.has_residual ? static_cast<const float*>(inputs[2].data) : nullptr,
                             static_cast<float*>(output)};
  const auto run = ATTN_DEPLOY_KERNEL(RunGate);
  const int64_t elements = ElementsPerBlock(form_.activation);
  const int64_t blocks = (plan.size + elements - 1) / elements;
  return ParallelBlocks(Api(), context, blocks, [&](int64_t block) {
    run(plan, form_.activation, arrays, block * elements, std::min((block + 1) * elements, plan.size));
  });
}

OrtStatus* MakeGate(const CpuOp& op, const OrtKernelInfo*, std::string node_name, std::unique_ptr<Kernel>* kernel) {
  *kernel = std::make_unique<GateKernel>(op, std::move(node_name));
  return nullptr;
}

}  // namespace

void AppendGate(const OrtApi& api, Operators* operators) {
  for (const GateForm& form : kForms) {
    std::vector<Operand> inputs = {{"x"}, {"gate"}};
    if (form.has_residual) inputs.push_back({"residual"});
    operators->push_back(std::make_unique<CpuOp>(api, form.name, inputs, MakeGate, LikeFirstInput, &form));
  }
}

}  // namespace attn_deploy::native
