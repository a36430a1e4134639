// What the operators Attention and PackedAttention share: the forms of attn_deploy/ops/scores.py, their inputs behind
// query, key and value, and the splitting of the work.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "attention_plan.h"
#include "operator.h"

namespace attn_deploy::native {

// Which inputs a form has and what it does; its name says the same.
struct AttentionFlags {
  bool indexed = false;
  bool padded = false;
  bool grouped = false;
  bool cosine = false;
  bool softcap = false;
  bool causal = false;
  bool bias = false;
  bool mask = false;
};

// An operator and its flags.
struct AttentionOp : CpuOp {
  AttentionOp(const ort::OrtApi& api, const char* kind, const AttentionFlags& flags, std::vector<Operand> inputs,
              MakeKernel make, InferShape infer);

  const AttentionFlags flags;
};

// All forms of Scores in attn_deploy/ops/scores.py, as flags.
std::vector<AttentionFlags> AllScores();

// The operands head_scale, bias and mask of a form.
void AppendScoreOperands(const AttentionFlags& flags, std::vector<Operand>* inputs);

Shape MakeShape(std::initializer_list<int64_t> dims);

// The strides of a dense [item, head, query, key] tensor, 0 where it has one value for all.
void BroadcastStrides(const Shape& shape, int64_t (&strides)[4]);

class AttentionKernel : public Kernel {
 public:
  AttentionKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), flags(static_cast<const AttentionOp&>(op).flags) {}

  // Reads the attributes.
  virtual ort::OrtStatus* Initialize(const ort::OrtKernelInfo* info);

 protected:
  ort::OrtStatus* Expect(const char* name, const Shape& got, const Shape& expected) const;
  ort::OrtStatus* ExpectBroadcast(const char* name, const Shape& got, const Shape& full) const;

  // Attributes and flags, to be filled up with shapes and tensors.
  AttentionProblem Start() const;
  // The tensors from input `next` on that AppendScoreOperands has named; `full` is [batch, heads, query_len, key_len].
  ort::OrtStatus* ReadScores(const std::vector<InputTensor>& inputs, size_t next, AttentionProblem* problem) const;
  // Computes every block. `output` may be empty.
  ort::OrtStatus* Run(const ort::OrtKernelContext* context, const AttentionProblem& problem) const;

  const AttentionFlags& flags;

 private:
  float scale_ = 1.0f;
  float softcap_ = 0.0f;
};

template <typename OneKernel>
ort::OrtStatus* MakeAttentionKernel(const CpuOp& op, const ort::OrtKernelInfo* info, std::string node_name,
                                    std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<OneKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Initialize(info));
  *kernel = std::move(made);
  return nullptr;
}

}  // namespace attn_deploy::native
