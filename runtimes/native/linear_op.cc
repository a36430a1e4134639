// [Norm]Linear[Gelu|Relu|Silu|GeluTanh|Hardswish][Residual]: attn_deploy/ops/linear.py says what they compute.
#include <string>
#include <utility>
#include <vector>

#include "kernels/linear.h"
#include "linear_weights.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct Named {
  const char* name;
  Activation activation;
};

constexpr Named kActivations[] = {{"", Activation::kNone},         {"Gelu", Activation::kGelu},
                                  {"Relu", Activation::kRelu},     {"Silu", Activation::kSilu},
                                  {"GeluTanh", Activation::kGeluTanh}, {"Hardswish", Activation::kHardswish}};

struct LinearForm {
  Activation activation;
  bool has_norm;
  bool has_residual;
};

// Order of the inputs: x, weight, bias, norm_scale and norm_bias if any, residual if any.
constexpr size_t kWeight = 1;
constexpr size_t kBias = 2;
constexpr size_t kNormScale = 3;
constexpr size_t kNormBias = 4;

// The form lives as long as its operator.
struct LinearOp : CpuOp {
  LinearOp(const OrtApi& api, std::string name, std::vector<Operand> inputs, MakeKernel make, InferShape infer,
           const LinearForm& linear_form)
      : CpuOp(api, std::move(name), std::move(inputs), make, infer), linear(linear_form) {}
  const LinearForm linear;
};

class LinearKernel : public Kernel {
 public:
  LinearKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(static_cast<const LinearOp&>(op).linear) {}

  OrtStatus* Init(const OrtKernelInfo* info) {
    LinearInputs inputs = {kWeight, kBias};
    if (form_.has_norm) {
      inputs.norm_scale = kNormScale;
      inputs.norm_bias = kNormBias;
      ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "epsilon", &epsilon_));
    }
    return weights_.Read(*this, info, inputs);
  }

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const LinearForm& form_;
  float epsilon_ = 0.0f;
  LinearWeights weights_;
};

OrtStatus* LinearKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  LinearPlan plan;
  ATTN_DEPLOY_RETURN_IF_ERROR(CountRows(*this, inputs[0].shape, weights_.in(), &plan.rows));
  Shape output = inputs[0].shape;
  output.dims[output.rank - 1] = weights_.out();
  if (form_.has_residual && inputs.back().shape != output) {
    return Fail("residual has shape " + ToString(inputs.back().shape) + ", x has " + ToString(inputs[0].shape) +
                "; expected a residual of shape " + ToString(output));
  }
  void* y = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, output, &y));
  if (plan.rows == 0) return nullptr;

  plan.in = weights_.in();
  plan.out = weights_.out();
  plan.activation = form_.activation;
  plan.normalizes = form_.has_norm;
  plan.epsilon = epsilon_;
  ATTN_DEPLOY_KERNEL(PlanLinear)(&plan);
  const LinearArrays arrays = {static_cast<const float*>(inputs[0].data),
                               plan.in,
                               weights_.packed(),
                               form_.has_residual ? static_cast<const float*>(inputs.back().data) : nullptr,
                               plan.out,
                               static_cast<float*>(y),
                               plan.out};
  const auto run = ATTN_DEPLOY_KERNEL(RunLinear);
  return ParallelBlocks(Api(), context, plan.blocks(),
                        [&](int64_t block) { run(plan, arrays, block, ThreadScratch().Floats(plan.scratch)); });
}

OrtStatus* MakeLinear(const CpuOp& op, const OrtKernelInfo* info, std::string node_name,
                      std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<LinearKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Init(info));
  *kernel = std::move(made);
  return nullptr;
}

// x's, but for the last dim, which is the weights'.
bool InferLinear(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  const Shape& weight = inputs[kWeight];
  if (weight.rank != 2 || weight.dims[1] < 0) return false;
  *output = inputs[0];
  output->dims[output->rank - 1] = weight.dims[1];
  return true;
}

}  // namespace

void AppendLinear(const OrtApi& api, Operators* operators) {
  for (const bool has_norm : {false, true}) {
    for (const Named& activation : kActivations) {
      for (const bool has_residual : {false, true}) {
        std::vector<Operand> inputs = {{"x"}, {"weight"}, {"bias"}};
        if (has_norm) inputs.insert(inputs.end(), {{"norm_scale"}, {"norm_bias"}});
        if (has_residual) inputs.push_back({"residual"});
        std::string name = std::string(has_norm ? "Norm" : "") + "Linear" + activation.name;
        if (has_residual) name += "Residual";
        operators->push_back(
            std::make_unique<LinearOp>(api, std::move(name), std::move(inputs), MakeLinear, InferLinear,
                                       LinearForm{activation.activation, has_norm, has_residual}));
      }
    }
  }
}

}  // namespace attn_deploy::native
