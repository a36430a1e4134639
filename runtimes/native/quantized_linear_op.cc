// Quantized[Norm]Linear[Gelu|Relu|Silu|GeluTanh|Hardswish][Residual]: attn_deploy/ops/quantized_linear.py says what they
// compute.
#include <string>
#include <utility>
#include <vector>

#include "kernels/quantized_linear.h"
#include "linear_forms.h"
#include "operators.h"
#include "quantized_linear_weights.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

// Order of the inputs: x, these, norm_scale and norm_bias if any, residual if any.
constexpr QuantizedLinearInputs kWeights = {1, 2, 3};
constexpr size_t kNormScale = 4;
constexpr size_t kNormBias = 5;

class QuantizedLinearKernel : public Kernel {
 public:
  QuantizedLinearKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(static_cast<const LinearOp&>(op).linear) {}

  OrtStatus* Init(const OrtKernelInfo* info) {
    ATTN_DEPLOY_RETURN_IF_ERROR(weights_.Read(*this, info, kWeights));
    if (!form_.has_norm) return nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadFiniteVector(*this, info, kNormScale, weights_.in(), &norm_scale_));
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadFiniteVector(*this, info, kNormBias, weights_.in(), &norm_bias_));
    return GetFloat(Api(), info, "epsilon", &epsilon_);
  }

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const LinearForm& form_;
  float epsilon_ = 0.0f;
  QuantizedLinearWeights weights_;
  std::vector<float> norm_scale_;
  std::vector<float> norm_bias_;
};

OrtStatus* QuantizedLinearKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  QuantizedLinearPlan plan;
  plan.in = weights_.in();
  plan.out = weights_.out();
  QuantizedLinearArrays arrays;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      MakeLinearOutput(*this, context, form_, inputs, plan.in, plan.out, &plan.rows, &arrays.y));
  if (plan.rows == 0) return nullptr;

  plan.activation = form_.activation;
  plan.normalizes = form_.has_norm;
  plan.epsilon = epsilon_;
  ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedLinear)(&plan);
  arrays.x = static_cast<const float*>(inputs[0].data);
  arrays.x_stride = plan.in;
  arrays.weights = weights_.packed();
  arrays.norm_scale = norm_scale_.data();
  arrays.norm_bias = norm_bias_.data();
  if (form_.has_residual) arrays.residual = static_cast<const float*>(inputs.back().data);
  arrays.residual_stride = plan.out;
  arrays.y_stride = plan.out;
  const auto run = ATTN_DEPLOY_INT8_KERNEL(RunQuantizedLinear);
  return ParallelBlocks(Api(), context, plan.blocks(),
                        [&](int64_t block) { run(plan, arrays, block, ThreadScratch().Floats(plan.scratch)); });
}

}  // namespace

void AppendQuantizedLinear(const OrtApi& api, Operators* operators) {
  AppendLinearForms(api, "Quantized", {{"weight", ElementType::kUint8}, {"weight_scale"}, {"bias"}},
                    MakeInitialized<QuantizedLinearKernel>, operators);
}

}  // namespace attn_deploy::native
