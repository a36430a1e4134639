#include "packed_attention_launch.cuh"

namespace attn_deploy::cuda {

cudaError_t LaunchFloat16(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  return LaunchMma<Half>(arguments, grid, stream);
}

}  // namespace attn_deploy::cuda
