// The Gate kernel as operators of ONNX Runtime, with the inputs and shapes of attn_deploy/ops/gate.py.
#include <string>
#include <utility>

#include "gate.h"
#include "operator.h"

namespace attn_deploy::cuda {
namespace {

using namespace ort;
using native::Activation;
using native::InputTensor;
using native::kMaxRank;
using native::Shape;

struct GateOp : CudaOp {
  GateOp(const OrtApi& api, std::string name, bool has_residual, Activation activation_, Element element);

  const Activation activation;
};

struct GateKernel : Kernel {
  using Kernel::Kernel;

  OrtStatus* Check(const std::vector<InputTensor>& inputs) const {
    const Shape& x = inputs[0].shape;
    if (x.rank < 1) return Fail("x is a scalar; expected rank 1 to " + std::to_string(kMaxRank));
    if (!native::GateBroadcasts(x, inputs[1].shape)) {
      return Fail("gate has shape " + ToString(inputs[1].shape) + ", x has " + ToString(x) +
                  "; expected a gate of x's rank, every dim x's or 1");
    }
    if (inputs.size() > 2 && inputs[2].shape != x) {
      return Fail("residual has shape " + ToString(inputs[2].shape) + ", x has " + ToString(x) +
                  "; expected a residual of x's shape");
    }
    return nullptr;
  }

  OrtStatus* Compute(OrtKernelContext* context) const override {
    std::vector<InputTensor> inputs;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
    ATTN_DEPLOY_RETURN_IF_ERROR(Check(inputs));
    GateArguments arguments;
    arguments.x = inputs[0].data;
    arguments.gate = inputs[1].data;
    arguments.residual = inputs.size() > 2 ? inputs[2].data : nullptr;
    arguments.plan = native::PlanGate(inputs[0].shape, inputs[1].shape);
    ATTN_DEPLOY_RETURN_IF_ERROR(native::MakeOutput(Api(), context, 0, inputs[0].shape, &arguments.output));
    cudaStream_t stream = nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetStream(Api(), context, &stream));
    const Activation activation = static_cast<const GateOp&>(op).activation;
    return CheckCuda(LaunchGate(arguments, activation, op.element, device, stream), "the kernel did not start");
  }
};

OrtStatus* Create(const CudaOp& op, const OrtKernelInfo*, std::string node_name, const Device& device,
                  std::unique_ptr<Kernel>* kernel) {
  *kernel = std::make_unique<GateKernel>(op, std::move(node_name), device);
  return nullptr;
}

bool Infer(const Shape& first, Shape* output, int (&from)[kMaxRank]) {
  *output = first;
  for (int d = 0; d < kMaxRank; ++d) from[d] = d;
  return true;
}

std::vector<Operand> InputsOf(bool has_residual) {
  if (has_residual) return {{"x"}, {"gate"}, {"residual"}};
  return {{"x"}, {"gate"}};
}

GateOp::GateOp(const OrtApi& api_, std::string name_, bool has_residual, Activation activation_, Element element_)
    : CudaOp(api_, std::move(name_), InputsOf(has_residual), 1, element_, Create, Infer), activation(activation_) {}

}  // namespace

void AppendGate(const OrtApi& api, Element element, Operators* operators) {
  constexpr std::pair<const char*, Activation> kActivations[] = {
      {"", Activation::kNone}, {"Relu", Activation::kRelu}, {"Silu", Activation::kSilu}};
  for (const bool has_residual : {false, true}) {
    for (const auto& [suffix, activation] : kActivations) {
      const std::string name = std::string(has_residual ? "GateResidual" : "Gate") + suffix;
      operators->push_back(std::make_unique<GateOp>(api, name, has_residual, activation, element));
    }
  }
}

}  // namespace attn_deploy::cuda
