// [Norm]Linear[Gelu|Relu|Silu|GeluTanh|Hardswish][Residual]: attn_deploy/ops/linear.py says what they compute.
#include <string>
#include <utility>
#include <vector>

#include "kernels/linear.h"
#include "linear_forms.h"
#include "linear_weights.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

// Order of the inputs: x, weight, bias, norm_scale and norm_bias if any, residual if any.
constexpr size_t kWeight = 1;
constexpr size_t kBias = 2;
constexpr size_t kNormScale = 3;
constexpr size_t kNormBias = 4;

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
  plan.in = weights_.in();
  plan.out = weights_.out();
  float* y = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeLinearOutput(*this, context, form_, inputs, plan.in, plan.out, &plan.rows, &y));
  if (plan.rows == 0) return nullptr;

  plan.activation = form_.activation;
  plan.normalizes = form_.has_norm;
  plan.epsilon = epsilon_;
  ATTN_DEPLOY_KERNEL(PlanLinear)(&plan);
  const LinearArrays arrays = {static_cast<const float*>(inputs[0].data),
                               plan.in,
                               weights_.packed(),
                               form_.has_residual ? static_cast<const float*>(inputs.back().data) : nullptr,
                               plan.out,
                               y,
                               plan.out};
  const auto run = ATTN_DEPLOY_KERNEL(RunLinear);
  return ParallelBlocks(Api(), context, plan.blocks(),
                        [&](int64_t block) { run(plan, arrays, block, ThreadScratch().Floats(plan.scratch)); });
}

}  // namespace

void AppendLinear(const OrtApi& api, Operators* operators) {
  AppendLinearForms(api, "", {{"weight"}, {"bias"}}, MakeInitialized<LinearKernel>, operators);
}

}  // namespace attn_deploy::native
