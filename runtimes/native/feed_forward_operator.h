// What the operators FeedForward and QuantizedFeedForward share: their forms, and the checks of their shapes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "activation.h"
#include "linear_weights.h"
#include "operator.h"

namespace attn_deploy::native {

struct FeedForwardForm {
  const char* suffix;
  Activation activation;
};

class FeedForwardKernel : public Kernel {
 public:
  FeedForwardKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), activation_(static_cast<const FeedForwardForm*>(op.form)->activation) {}

  // Reads the attributes and the weights, and gives their sizes.
  virtual ort::OrtStatus* Init(const ort::OrtKernelInfo* info) = 0;
  ort::OrtStatus* Compute(ort::OrtKernelContext* context) const override;

 protected:
  // A layer's weight: [in, out].
  struct Layer {
    int64_t in;
    int64_t out;
  };

  // Whether the second layer takes what the first one gives, and gives what that takes.
  ort::OrtStatus* CheckLayers(Layer first, Layer second);

  Activation activation() const { return activation_; }

 private:
  // x and y: at least one row of as many channels as the first layer takes.
  virtual ort::OrtStatus* Run(ort::OrtKernelContext* context, const float* x, float* y, int64_t rows) const = 0;

  const Activation activation_;
  int64_t channels_ = 0;
};

// Operators named `prefix` and the suffix of each form.
void AppendFeedForwardForms(const ort::OrtApi& api, const std::string& prefix, const std::vector<Operand>& inputs,
                            CpuOp::MakeKernel make, Operators* operators);

}  // namespace attn_deploy::native
