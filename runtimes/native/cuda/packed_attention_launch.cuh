// Choice of the PackedAttention kernel for one element type, made by each type's source file.
#pragma once

#include "launch.h"
#include "packed_attention_mma.cuh"
#include "packed_attention_simt.cuh"

namespace attn_deploy::cuda {

cudaError_t LaunchFloat32(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream);
cudaError_t LaunchFloat16(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream);
cudaError_t LaunchBfloat16(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream);
cudaError_t LaunchBfloat16Simt(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream);

// Query rows of a block of the kernel without tensor cores.
constexpr int SimtRows(int head_dim) {
  return head_dim <= 32 ? SimtLayout<32>::kRows : head_dim <= 64 ? SimtLayout<64>::kRows : SimtLayout<128>::kRows;
}

template <typename T, int kHeadDim>
cudaError_t LaunchMmaOf(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  // Two stages of 128 elements would need 102 KiB, more than Turing and Ada have.
  constexpr int kStages = kHeadDim <= 64 ? 2 : 1;
  constexpr int kBytes = MmaLayout<kHeadDim, kStages>::kBytes;
  const bool one_tile = arguments.length <= kMmaKeys;
  const bool same_for_samples = arguments.bias_index != nullptr || arguments.bias_strides[0] == 0;
  const auto launch = [&](auto kernel) { return Launch(kernel, grid, kMmaThreads, kBytes, stream, arguments); };
  if (!IsPlain(arguments)) return launch(MmaAttention<T, kHeadDim, kStages, false, false>);
  if (arguments.bias != nullptr && one_tile && same_for_samples) {
    return launch(MmaAttention<T, kHeadDim, kStages, true, true>);
  }
  return launch(MmaAttention<T, kHeadDim, kStages, true, false>);
}

template <typename T>
cudaError_t LaunchMma(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  if (arguments.head_dim <= 32) return LaunchMmaOf<T, 32>(arguments, grid, stream);
  if (arguments.head_dim <= 64) return LaunchMmaOf<T, 64>(arguments, grid, stream);
  return LaunchMmaOf<T, 128>(arguments, grid, stream);
}

template <typename T, int kHeadDim>
cudaError_t LaunchSimtOf(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  const auto kernel = IsPlain(arguments) ? SimtAttention<T, kHeadDim, true> : SimtAttention<T, kHeadDim, false>;
  return Launch(kernel, grid, kSimtThreads, SimtLayout<kHeadDim>::kBytes, stream, arguments);
}

template <typename T>
cudaError_t LaunchSimt(const PackedAttentionArguments& arguments, dim3 grid, cudaStream_t stream) {
  if (arguments.head_dim <= 32) return LaunchSimtOf<T, 32>(arguments, grid, stream);
  if (arguments.head_dim <= 64) return LaunchSimtOf<T, 64>(arguments, grid, stream);
  return LaunchSimtOf<T, 128>(arguments, grid, stream);
}

}  // namespace attn_deploy::cuda
