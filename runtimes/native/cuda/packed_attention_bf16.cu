#include "packed_attention_launch.cuh"

namespace attn_deploy::cuda {

cudaError_t LaunchBfloat16(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  return LaunchMma<Bfloat16>(arguments, grid, stream);
}

}  // namespace attn_deploy::cuda
