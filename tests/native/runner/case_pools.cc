// Cases of the kernels ChannelPool and SpatialPool: ints {with mean, with maximum}, inputs {x}, the outputs asked for.
#include "case.h"
#include "kernels/channel_pool.h"
#include "kernels/spatial_pool.h"

namespace attn_deploy::native::runner {
namespace {

struct Pooled {
  Pooled(const Case& c, int64_t count) {
    for (const int64_t wanted : {c.ints.at(0), c.ints.at(1)}) {
      if (wanted != 0) outputs.emplace_back(Type::kFloat, std::vector<int64_t>{count}, 1);
    }
    mean = c.ints[0] != 0 ? outputs.front().floats() : nullptr;
    maximum = c.ints[1] != 0 ? outputs.back().floats() : nullptr;
  }

  std::vector<Array> outputs;
  float* mean;
  float* maximum;
};

// x [planes, pixels].
std::vector<Array> RunChannelPool(const Case& c) {
  const Array& x = c.inputs.at(0);
  Pooled pooled(c, x.dims.at(0));
  ATTN_DEPLOY_KERNEL(ChannelPool)(x.floats(), x.dims.at(0), x.dims.at(1), pooled.mean, pooled.maximum);
  return std::move(pooled.outputs);
}

// x [channels, stride]; ints also {pixels}.
std::vector<Array> RunSpatialPool(const Case& c) {
  const Array& x = c.inputs.at(0);
  Pooled pooled(c, c.ints.at(2));
  ATTN_DEPLOY_KERNEL(SpatialPool)
  (x.floats(), x.dims.at(0), x.dims.at(1), c.ints[2], pooled.mean, pooled.maximum);
  return std::move(pooled.outputs);
}

const Registered kChannelPool("channel_pool", RunChannelPool);
const Registered kSpatialPool("spatial_pool", RunSpatialPool);

}  // namespace
}  // namespace attn_deploy::native::runner
