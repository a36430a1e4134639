// The forms that a linear layer's operators have, in float32 and in 8 bits: with LayerNorm before or not, an activation
// or none, a residual after or not.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "activation.h"
#include "operator.h"

namespace attn_deploy::native {

struct LinearForm {
  Activation activation;
  bool has_norm;
  bool has_residual;
};

struct LinearOp : CpuOp {
  LinearOp(const ort::OrtApi& api, std::string name, std::vector<Operand> inputs, MakeKernel make,
           const LinearForm& form);
  const LinearForm linear;  // lives as long as every kernel of the operator
};

// [Norm]Linear[Gelu|Relu|Silu|GeluTanh|Hardswish][Residual], with `prefix` before it. Order of the inputs: x, `weights`
// (the weight first), norm_scale and norm_bias if any, residual if any.
void AppendLinearForms(const ort::OrtApi& api, const std::string& prefix, const std::vector<Operand>& weights,
                       CpuOp::MakeKernel make, Operators* operators);

// Makes output 0 [..., out] for x [..., in] and counts its rows; an error with the node's name where x or the residual,
// which is the last input if there is one, is of another shape.
ort::OrtStatus* MakeLinearOutput(const Kernel& kernel, ort::OrtKernelContext* context, const LinearForm& form,
                                 const std::vector<InputTensor>& inputs, int64_t in, int64_t out, int64_t* rows,
                                 float** y);

}  // namespace attn_deploy::native
