// What the operators AttentionBlock and QuantizedAttentionBlock share: the forms over an index map, their inputs behind
// the projections, and the splitting of the work.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/attention_block.h"
#include "operator.h"

namespace attn_deploy::native {

// Everything but x is a constant: checked and copied when the kernel is made.
class AttentionBlockKernel : public Kernel {
 public:
  using Kernel::Kernel;

  virtual ort::OrtStatus* Init(const ort::OrtKernelInfo* info) = 0;
  ort::OrtStatus* Compute(ort::OrtKernelContext* context) const override;

 protected:
  // A projection's weight: [in, out].
  struct Projection {
    int64_t in;
    int64_t out;
  };

  // The attributes, and the inputs from bias_out (number `bias_out`) on, for projections of these sizes.
  ort::OrtStatus* ReadAttention(const ort::OrtKernelInfo* info, Projection qkv, Projection out, size_t bias_out);

  // Complete after ReadAttention; what it points to lives as long as this kernel.
  const WindowAttention& attention() const { return attention_; }

 private:
  // The kernel and its scratch memory, as kernels/attention_block.h has them.
  virtual AttentionBlockScratch ScratchOf(int64_t windows) const = 0;
  virtual void RunWindows(const float* x, float* y, int64_t begin, int64_t end, float* floats,
                          int64_t* ints) const = 0;

  ort::OrtStatus* CheckShape(const InputTensor& input, size_t at, const Shape& expected) const;
  ort::OrtStatus* CheckIndex(bool padded);
  ort::OrtStatus* KeepExtra(const std::vector<InputTensor>& inputs, size_t at);

  WindowAttention attention_;
  std::vector<float> bias_out_, fill_, head_scale_, bias_;
  std::vector<int64_t> index_, bias_index_, outside_;
};

// Operators named `prefix` and the suffix of each form. `inputs`: those up to bias_out.
void AppendAttentionBlockForms(const ort::OrtApi& api, const std::string& prefix, const std::vector<Operand>& inputs,
                               CpuOp::MakeKernel make, Operators* operators);

}  // namespace attn_deploy::native
