/* The words that CUDA's headers put around declarations, for a plain C compiler: the real file comes with nvcc alone. */
#ifndef STAND_IN_HOST_DEFINES_H
#define STAND_IN_HOST_DEFINES_H
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __specialization_static
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __CUDA_HOSTDEVICE__
#endif
