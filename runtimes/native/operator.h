// What the CPU operators' adapters share: an operator as ONNX Runtime knows it, the kernel of one node, and the
// splitting of its work over ONNX Runtime's pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ort_adapter.h"
#include "scratch.h"

namespace attn_deploy::native {

enum class ElementType { kFloat, kInt64, kBool, kInt8, kUint8, kInt32 };

ort::ONNXTensorElementDataType OnnxType(ElementType type);

struct Operand {
  const char* name;
  ElementType type = ElementType::kFloat;
};

struct CpuOp;

// One node of a session. Compute may run on several threads at once.
class Kernel {
 public:
  Kernel(const CpuOp& op, std::string node_name) : op(op), node_name(std::move(node_name)) {}
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  virtual ~Kernel() = default;

  // Checks inputs, makes outputs and fills them. May throw.
  virtual ort::OrtStatus* Compute(ort::OrtKernelContext* context) const = 0;

  const ort::OrtApi& Api() const;

  // "PackedAttention node 'block/attention': " and the message, as an error. Throws std::bad_alloc.
  ort::OrtStatus* Fail(const std::string& message) const;

  // All inputs of the node; fails where one is missing, of another type, or has more than kMaxRank dims.
  ort::OrtStatus* GetInputs(const ort::OrtKernelContext* context, std::vector<InputTensor>* inputs) const;

  const CpuOp& op;
  const std::string node_name;
};

// An operator; lives as long as every session that uses it. `form` tells MakeKernel which of its forms this is.
struct CpuOp : ort::OrtCustomOp {
  using MakeKernel = ort::OrtStatus* (*)(const CpuOp& op, const ort::OrtKernelInfo* info, std::string node_name,
                                         std::unique_ptr<Kernel>* kernel);
  // The output's shape from those of the inputs; false where it cannot be told. A shape of rank 0 is unknown, a dim of
  // -1 too: an output's dim that is -1 takes the name of dim `from[d]` of input 0.
  using InferShape = bool (*)(const std::vector<Shape>& inputs, Shape* output, int (&from)[kMaxRank]);

  // `infer_more`: for each output beyond the first, its shape.
  CpuOp(const ort::OrtApi& api, std::string name, std::vector<Operand> inputs, MakeKernel make, InferShape infer,
        const void* form = nullptr, std::vector<InferShape> infer_more = {});
  virtual ~CpuOp() = default;

  const ort::OrtApi& api;
  const std::string name;
  const std::vector<Operand> inputs;
  const MakeKernel make;
  const InferShape infer;  // may be null, those of further outputs not
  const std::vector<InferShape> infer_more;
  const void* const form;
  ElementType output_type = ElementType::kFloat;  // of every output
};

using Operators = std::vector<std::unique_ptr<CpuOp>>;

// A CpuOp::MakeKernel for a kernel whose Init(info) reads and checks what is constant.
template <typename OneKernel>
ort::OrtStatus* MakeInitialized(const CpuOp& op, const ort::OrtKernelInfo* info, std::string node_name,
                                std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<OneKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Init(info));
  *kernel = std::move(made);
  return nullptr;
}

// Shape of input 0.
bool LikeFirstInput(const std::vector<Shape>& inputs, Shape* output, int (&from)[kMaxRank]);

// Attributes and constants of a node, to be read while its kernel is made.
ort::OrtStatus* GetFloat(const ort::OrtApi& api, const ort::OrtKernelInfo* info, const char* name, float* value);
ort::OrtStatus* GetInt(const ort::OrtApi& api, const ort::OrtKernelInfo* info, const char* name, int64_t* value);
// Not `present` where the input is no constant. Valid while the kernel is made.
ort::OrtStatus* GetConstant(const ort::OrtApi& api, const ort::OrtKernelInfo* info, size_t index, InputTensor* input);

// Runs body(block) for every block in [0, blocks), on ONNX Runtime's pool; each thread claims the next block when it is
// done with one, so that a thread that another process slows down delays nobody. Denormals are flushed to zero inside.
// `body` is called by several threads at once; what it throws (memory that is not there) becomes an error once all have
// ended. One block runs in the calling thread.
template <typename Body>
ort::OrtStatus* ParallelBlocks(const ort::OrtApi& api, const ort::OrtKernelContext* context, int64_t blocks,
                               const Body& body) {
  if (blocks <= 0) return nullptr;
  if (blocks == 1) {
    const FlushDenormals flush;
    body(int64_t{0});
    return nullptr;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t blocks = 0;
    const Body* body = nullptr;
  } shared;
  shared.blocks = blocks;
  shared.body = &body;
  // ONNX Runtime gives each thread a contiguous run of units; the first unit of a thread claims until nothing is left.
  constexpr int64_t kMaxThreads = 256;
  const auto units = static_cast<size_t>(blocks < kMaxThreads ? blocks : kMaxThreads);
  ATTN_DEPLOY_RETURN_IF_ERROR(api.KernelContext_ParallelFor(
      context,
      [](void* user_data, size_t) {
        auto& work = *static_cast<Shared*>(user_data);
        const FlushDenormals flush;
        for (int64_t block = work.next.fetch_add(1, std::memory_order_relaxed); block < work.blocks;
             block = work.next.fetch_add(1, std::memory_order_relaxed)) {
          try {
            (*work.body)(block);
          } catch (...) {
            work.failed = true;
          }
        }
      },
      units, 0, &shared));
  return shared.failed ? api.CreateStatus(ort::ORT_FAIL, "attn_deploy: out of memory in a kernel") : nullptr;
}

}  // namespace attn_deploy::native
