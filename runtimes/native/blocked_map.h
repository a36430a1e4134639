// What operators on ONNX Runtime's blocked layout (NCHWc) share. They live in graphs that ONNX Runtime has optimized
// for this CPU, between its own blocked convolutions, and are no forms: no model that leaves a machine has them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "operator.h"

namespace attn_deploy::native {

// A tensor [batch, padded channels, height, width] whose bytes are [batch, padded channels / block, pixels, block].
struct BlockedMap {
  int64_t batch = 0;
  int64_t padded = 0;  // channels, a multiple of `block`
  int64_t pixels = 0;
  int64_t block = 0;

  int64_t planes() const { return batch * (padded / block); }
};

// Attributes: block, 8 or 16, as ONNX Runtime has it on this CPU; channels, those that are not padding.
class BlockedKernel : public Kernel {
 public:
  using Kernel::Kernel;

  // To be called before the kernel is used.
  ort::OrtStatus* ReadAttributes(const ort::OrtKernelInfo* info);

  int64_t block() const { return block_; }
  int64_t channels() const { return channels_; }

 protected:
  // Fails where `shape`, that of the operand `name`, is no blocked map with these channels.
  ort::OrtStatus* ReadMap(const char* name, const Shape& shape, BlockedMap* map) const;

 private:
  int64_t block_ = 0;
  int64_t channels_ = 0;
};

// How the planes of a map are cut into work: whole planes together where they are small, parts of one where large. The
// same on any number of threads.
struct BlockedPieces {
  BlockedPieces(const BlockedMap& map, int64_t elements_per_block);

  int64_t pixels;            // of a part, at most
  int64_t parts;             // of a plane
  int64_t planes_per_block;  // 1 where parts > 1
  int64_t blocks;
};

// Runs body(plane, part, first pixel, pixels) for every part of every plane.
template <typename Body>
ort::OrtStatus* ParallelPieces(const ort::OrtApi& api, const ort::OrtKernelContext* context, const BlockedMap& map,
                               const BlockedPieces& pieces, const Body& body) {
  return ParallelBlocks(api, context, pieces.blocks, [&](int64_t block) {
    const int64_t part = block % pieces.parts;
    const int64_t first = part * pieces.pixels;
    const int64_t pixels = first + pieces.pixels < map.pixels ? pieces.pixels : map.pixels - first;
    const int64_t begin = block / pieces.parts * pieces.planes_per_block;
    const int64_t end = begin + pieces.planes_per_block < map.planes() ? begin + pieces.planes_per_block : map.planes();
    for (int64_t plane = begin; plane < end; ++plane) body(plane, part, first, pixels);
  });
}

// Shape of input 0 with one pixel.
bool LikePooledFirstInput(const std::vector<Shape>& inputs, Shape* output, int (&from)[kMaxRank]);

// CpuOp::MakeKernel of operators whose kernel class is made of the operator and the node's name.
template <typename BlockedKernelOfOp>
ort::OrtStatus* MakeBlocked(const CpuOp& op, const ort::OrtKernelInfo* info, std::string node_name,
                            std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<BlockedKernelOfOp>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->ReadAttributes(info));
  *kernel = std::move(made);
  return nullptr;
}

}  // namespace attn_deploy::native
