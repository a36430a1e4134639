// The element types of the CUDA kernels, for host and device code alike.
#pragma once

namespace attn_deploy::cuda {

enum class Element { kFloat32, kFloat16, kBfloat16 };

// What the launchers need to know of the GPU that runs the kernels.
struct Device {
  int multiprocessors = 1;
  int compute_capability = 75;  // 10 * major + minor
};

}  // namespace attn_deploy::cuda
