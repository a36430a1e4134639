#include "blocked_map.h"

#include <algorithm>

#include "isa.h"

namespace attn_deploy::native {

using namespace ort;

OrtStatus* BlockedKernel::ReadAttributes(const OrtKernelInfo* info) {
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "block", &block_));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "channels", &channels_));
  if (block_ != 8 && block_ != 16) return Fail("block is " + std::to_string(block_) + "; expected 8 or 16");
  if (IsaFamily(ActiveIsa()) == Isa::kAvx512 && block_ == 8) return Fail("block is 8; expected 16 on this CPU");
  if (channels_ < 1) return Fail("channels is " + std::to_string(channels_) + "; expected at least 1");
  return nullptr;
}

OrtStatus* BlockedKernel::ReadMap(const char* name, const Shape& shape, BlockedMap* map) const {
  const int64_t padded = (channels_ + block_ - 1) / block_ * block_;
  if (shape.rank != 4 || shape.dims[1] != padded) {
    return Fail(std::string(name) + " has shape " + ToString(shape) + "; expected [batch," + std::to_string(padded) +
                ",height,width]");
  }
  *map = {shape.dims[0], padded, shape.dims[2] * shape.dims[3], block_};
  return nullptr;
}

BlockedPieces::BlockedPieces(const BlockedMap& map, int64_t elements_per_block) {
  const int64_t plane = std::max<int64_t>(map.pixels * map.block, 1);
  parts = (plane + elements_per_block - 1) / elements_per_block;
  pixels = parts == 1 ? map.pixels : (map.pixels + parts - 1) / parts;
  if (pixels > 0) parts = (map.pixels + pixels - 1) / pixels;
  planes_per_block = parts == 1 ? std::max<int64_t>(elements_per_block / plane, 1) : 1;
  blocks = map.pixels == 0 ? 0 : (map.planes() + planes_per_block - 1) / planes_per_block * parts;
}

bool LikePooledFirstInput(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  if (inputs[0].rank != 4) return false;
  *output = inputs[0];
  output->dims[2] = output->dims[3] = 1;
  return true;
}

}  // namespace attn_deploy::native
