// Code that is compiled for the CPU and, by nvcc, for the GPU too.
#pragma once

#ifdef __CUDACC__
#define MEGATRON_PD_HOST_DEVICE __host__ __device__
#else
#define MEGATRON_PD_HOST_DEVICE
#endif
