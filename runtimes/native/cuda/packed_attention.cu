#include "packed_attention.h"

#include <algorithm>
#include <limits>

#include "packed_attention_launch.cuh"

namespace attn_deploy::cuda {
namespace {

constexpr int64_t kMostBlocks = std::numeric_limits<int>::max();
constexpr int kMostSampleGroups = 65535;  // of grid.y

// Blocks per multiprocessor below which samples are not put together into one block: about what is resident, twice.
constexpr int64_t kBlocksPerMultiprocessor = 8;

bool IsAligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool AllowsWideCopies(const PackedAttentionArguments& p, Element element) {
  const int elements = element == Element::kFloat32 ? 4 : 8;
  return p.head_dim % elements == 0 && IsAligned(p.qkv) && IsAligned(p.fill) && IsAligned(p.output);
}

// Keys come in pairs that start at an even one: a pair is aligned when all that is added to it is even.
bool AllowsPairedBias(const PackedAttentionArguments& p) {
  const auto is_even = [](int64_t v) { return v % 2 == 0; };
  return p.bias_strides[3] == 1 && is_even(p.length) && std::all_of(p.bias_strides, p.bias_strides + 3, is_even) &&
         reinterpret_cast<uintptr_t>(p.bias) % 4 == 0;
}

}  // namespace

cudaError_t LaunchPackedAttention(const PackedAttentionArguments& arguments, Element element, const Device& device,
                                  cudaStream_t stream) {
  PackedAttentionArguments p = arguments;
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim || p.batch < 0 || p.length < 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.length == 0 || p.windows == 0 || p.heads == 0) return cudaSuccess;
  p.wide_copies = AllowsWideCopies(p, element);
  p.paired_bias = AllowsPairedBias(p);

  const bool tensor_cores = element == Element::kFloat16 ||
                            (element == Element::kBfloat16 && device.compute_capability >= 80);
  const int rows = tensor_cores ? kMmaRows : SimtRows(p.head_dim);
  const int64_t blocks = static_cast<int64_t>(p.windows) * p.heads * ((p.length + rows - 1) / rows);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  // Several samples to a block read a bias once and copy the next sample beside the work on this one; but first of
  // all, every multiprocessor has blocks.
  const int64_t wanted = device.multiprocessors * kBlocksPerMultiprocessor;
  const int64_t groups = std::clamp<int64_t>((wanted + blocks - 1) / blocks, 1, std::min(p.batch, kMostSampleGroups));
  p.samples_per_block = static_cast<int>((p.batch + groups - 1) / groups);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((p.batch + p.samples_per_block - 1) / p.samples_per_block));

  switch (element) {
    case Element::kFloat16:
      return LaunchFloat16(p, grid, stream);
    case Element::kBfloat16:
      return tensor_cores ? LaunchBfloat16(p, grid, stream) : LaunchBfloat16Simt(p, grid, stream);
    case Element::kFloat32:
      break;
  }
  return LaunchFloat32(p, grid, stream);
}

}  // namespace attn_deploy::cuda
