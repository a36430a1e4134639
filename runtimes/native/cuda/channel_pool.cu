#include "channel_pool.h"

#include <algorithm>

#include "launch.h"

namespace attn_deploy::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerMultiprocessor = 16;

// Planes up to here go to one warp each, so that a 7 x 7 map does not leave a block idle.
constexpr int64_t kWarpPixels = 2048;

struct Pooled {
  float sum = 0.0f;
  float maximum = -__builtin_huge_valf();

  // NaN once is NaN for good.
  __device__ void AddMaximum(float v) { maximum = v > maximum || v != v ? v : maximum; }

  __device__ void Add(float v) {
    sum += v;
    AddMaximum(v);
  }

  __device__ void Fold(int distance) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    AddMaximum(__shfl_xor_sync(0xffffffffu, maximum, distance));
  }
};

template <typename T>
__device__ void Write(const ChannelPoolArguments& p, int64_t plane, const Pooled& pooled) {
  if (p.mean != nullptr) {
    static_cast<T*>(p.mean)[plane] = FromFloat<T>(pooled.sum / static_cast<float>(p.pixels));
  }
  if (p.maximum != nullptr) static_cast<T*>(p.maximum)[plane] = FromFloat<T>(pooled.maximum);
}

// What one of `threads` threads adds of a plane. Bytes up to the first multiple of 16 and after the last one are read
// element by element: rows of 49 elements start anywhere.
template <typename T>
__device__ Pooled PoolPlane(const T* plane, int64_t pixels, int thread, int threads) {
  constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) Vector {
    T elements[kSize];
  };
  Pooled pooled;
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(plane) % 16 / sizeof(T));
  const int64_t head = min(pixels, (kSize - misaligned) % kSize);
  const int64_t vectors = (pixels - head) / kSize;
  for (int64_t i = thread; i < head; i += threads) pooled.Add(ToFloat(plane[i]));
  for (int64_t i = thread; i < vectors; i += threads) {
    const Vector vector = *reinterpret_cast<const Vector*>(plane + head + i * kSize);
#pragma unroll
    for (int e = 0; e < kSize; ++e) pooled.Add(ToFloat(vector.elements[e]));
  }
  for (int64_t i = head + vectors * kSize + thread; i < pixels; i += threads) pooled.Add(ToFloat(plane[i]));
  return pooled;
}

__device__ void FoldWarp(Pooled& pooled) {
  for (int distance = 16; distance > 0; distance /= 2) pooled.Fold(distance);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) PoolByWarp(const ChannelPoolArguments p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t plane = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; plane < p.planes; plane += step) {
    Pooled pooled = PoolPlane(static_cast<const T*>(p.x) + plane * p.pixels, p.pixels, lane, 32);
    FoldWarp(pooled);
    if (lane == 0) Write<T>(p, plane, pooled);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) PoolByBlock(const ChannelPoolArguments p) {
  Pooled* const of_warps = reinterpret_cast<Pooled*>(SharedMemory());
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t plane = blockIdx.x; plane < p.planes; plane += gridDim.x) {
    Pooled pooled = PoolPlane(static_cast<const T*>(p.x) + plane * p.pixels, p.pixels, thread, kThreads);
    FoldWarp(pooled);
    if (thread % 32 == 0) of_warps[thread / 32] = pooled;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kWarps; ++w) {
        pooled.sum += of_warps[w].sum;
        pooled.AddMaximum(of_warps[w].maximum);
      }
      Write<T>(p, plane, pooled);
    }
    __syncthreads();  // of_warps is free again
  }
}

template <typename T>
cudaError_t LaunchOf(const ChannelPoolArguments& p, const Device& device, cudaStream_t stream) {
  const bool by_warp = p.pixels <= kWarpPixels;
  const int64_t work = by_warp ? (p.planes + kWarps - 1) / kWarps : p.planes;
  const int64_t most = static_cast<int64_t>(device.multiprocessors) * kBlocksPerMultiprocessor;
  const dim3 grid(static_cast<unsigned>(std::min(work, most)));
  if (by_warp) return Launch(PoolByWarp<T>, grid, kThreads, 0, stream, p);
  return Launch(PoolByBlock<T>, grid, kThreads, kWarps * static_cast<int>(sizeof(Pooled)), stream, p);
}

}  // namespace

cudaError_t LaunchChannelPool(const ChannelPoolArguments& arguments, Element element, const Device& device,
                              cudaStream_t stream) {
  if (arguments.planes == 0) return cudaSuccess;
  if (arguments.pixels <= 0) return cudaErrorInvalidValue;
  switch (element) {
    case Element::kFloat16:
      return LaunchOf<Half>(arguments, device, stream);
    case Element::kBfloat16:
      return LaunchOf<Bfloat16>(arguments, device, stream);
    case Element::kFloat32:
      break;
  }
  return LaunchOf<float>(arguments, device, stream);
}

}  // namespace attn_deploy::cuda
