// The kernels of gram_schmidt.cu as a library of functions that run on the CPU.
#include "cuda_emulation.h"
//
#include "gram_schmidt.cu"

#ifndef CLUSTER
#define CLUSTER 1
#endif

// The kernel's address, the launch, then the kernel's own parameters.
#define LAUNCH(T, TYPE)                                                                       \
  extern "C" bool launch_##TYPE(void (*kernel)(PARAMETERS(T)), int grid, int threads,        \
                                long long shared, bool clustered, bool descending,           \
                                PARAMETERS(T)) {                                             \
    return emulation::launch(grid, threads, shared, clustered ? CLUSTER : 1, descending,     \
                             [=] { kernel(ARGUMENTS); });                                    \
  }
LAUNCH(float, float32)
LAUNCH(double, float64)
