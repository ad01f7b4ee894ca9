// Launch of the kernel in harm_score.cuh.
#include "harm_score.cuh"

namespace {

int status_of(cudaError_t error) { return error == cudaSuccess ? PROTECTOR_OK : PROTECTOR_CUDA_ERROR + error; }

}  // namespace

int protector_has_cuda(void) { return 1; }

const char *protector_status_text(int status) {
    if (status >= PROTECTOR_CUDA_ERROR) return cudaGetErrorString(cudaError_t(status - PROTECTOR_CUDA_ERROR));
    return status == PROTECTOR_OK ? "ok" : status == PROTECTOR_BAD_ARGUMENT ? "bad argument" : "unknown status";
}

int protector_harm_score_cuda(const protector_harm_score_args *args, int device, void *stream) {
    // A launch goes to the calling thread's current device, which need not be the one that holds the rows.
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return status_of(error);
    const int status = protector::choose_kernel(*args, [&](auto kernel, int64_t blocks, const auto &arguments) {
        kernel<<<unsigned(blocks), protector::BLOCK, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
        error = cudaGetLastError();
    });
    if (current != device) {
        const cudaError_t restored = cudaSetDevice(current);
        if (error == cudaSuccess) error = restored;
    }
    return status == PROTECTOR_OK ? status_of(error) : status;
}
