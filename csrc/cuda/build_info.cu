// Placeholder of the CUDA library: it carries no kernels yet, only the facts of its build, so that
// finding nvcc, choosing architectures, linking and loading are exercised before kernels arrive.

extern "C" __attribute__((visibility("default"))) const char* resfast_cuda_build_info() {
  return "{\"kernels\": false, \"nvcc\": \"" RESFAST_NVCC_VERSION
         "\", \"architectures\": \"" RESFAST_CUDA_ARCHS "\"}";
}
