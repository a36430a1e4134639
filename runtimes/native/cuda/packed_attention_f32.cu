#include "packed_attention_launch.cuh"

namespace attn_deploy::cuda {

cudaError_t LaunchFloat32(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  return LaunchSimt<float>(arguments, grid, stream);
}

}  // namespace attn_deploy::cuda
