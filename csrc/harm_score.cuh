// The kernel body and the choice of its instance, apart from the launch, so that tests/emulate_cuda.h can run both on
// the CPU. See harm_score.h for the equation.
#pragma once

#include "harm_score.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace protector {

constexpr int WARP = 32, BLOCK = 128;
// 16-byte loads each thread issues before it uses the first: 128 threads x 4 hold a row of 4096 bf16 in flight.
constexpr int IN_FLIGHT = 4;
// ptxas saves registers by putting each load next to its use unless told that this many blocks per multiprocessor are
// enough (read in the SASS of sm_90). 4 blocks x 128 threads x 4 x 16 bytes = 32 KiB in flight, about twice what
// 3.3 TB/s over 132 multiprocessors need at 700 ns.
constexpr int BLOCKS_PER_SM = 4;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Sixteen bytes of a row: the unit in which columns are dealt to threads.
template <class T>
struct alignas(16) Chunk {
    static constexpr int SIZE = 16 / sizeof(T);
    T value[SIZE];
};

// ALIGNED changes how a chunk is fetched and nothing about who adds what, so both give the same bits.
template <bool ALIGNED, class T>
__device__ inline Chunk<T> load(const T *from) {
    Chunk<T> chunk;
    if constexpr (ALIGNED) {
        // Streaming: each row is read once and must not push the weight out of the cache.
        const uint4 bits = __ldcs(reinterpret_cast<const uint4 *>(from));
        memcpy(&chunk, &bits, sizeof bits);
    } else {
#pragma unroll
        for (int slot = 0; slot < Chunk<T>::SIZE; ++slot) chunk.value[slot] = from[slot];
    }
    return chunk;
}

template <bool ALIGNED, int SIZE>
__device__ inline void load_weight(float (&weight)[SIZE], const float *from) {
    if constexpr (ALIGNED) {
#pragma unroll
        for (int slot = 0; slot < SIZE; slot += 4) {
            const float4 four = __ldg(reinterpret_cast<const float4 *>(from + slot));
            memcpy(weight + slot, &four, sizeof four);
        }
    } else {
#pragma unroll
        for (int slot = 0; slot < SIZE; ++slot) weight[slot] = from[slot];
    }
}

// Adds chunks first, first + stride, ..., COUNT of them, all loaded before the first is used.
template <int COUNT, bool ALIGNED, class T, int SIZE>
__device__ inline void add_chunks(float (&dots)[SIZE], float (&squares)[SIZE], const T *x, const float *weights,
                                  int64_t first, int stride) {
    Chunk<T> held[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) held[k] = load<ALIGNED>(x + (first + k * stride) * SIZE);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        float weight[SIZE];
        load_weight<ALIGNED>(weight, weights + (first + k * stride) * SIZE);
#pragma unroll
        for (int slot = 0; slot < SIZE; ++slot) {
            const float value = to_float(held[k].value[slot]);
            dots[slot] += weight[slot] * value;
            squares[slot] += value * value;
        }
    }
}

__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// WARPS warps share a row; a block of 4 warps holds 4 / WARPS rows. One warp needs no barrier and keeps short rows from
// idling three quarters of the block; four warps shorten the wait of a long row.
template <class T, int WARPS, bool ALIGNED>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) harm_score_kernel(const protector_harm_score_args args) {
    constexpr int THREADS = WARP * WARPS, SIZE = Chunk<T>::SIZE;
    const int thread = threadIdx.x % THREADS;
    const int64_t row = int64_t(blockIdx.x) * (BLOCK / THREADS) + threadIdx.x / THREADS;
    // Both returns are taken by all threads of a row together, so no barrier or shuffle below waits for one that left.
    if (row >= args.rows) return;
    const int64_t position = args.index ? args.index[row] : row;
    if (position < 0 || position >= args.positions) {
        if (thread == 0) args.out[row] = nanf("");
        return;
    }
    const T *x = static_cast<const T *>(args.hidden) + row * args.batch_stride + position * args.row_stride;

    // A sum per slot: 4096 columns of bf16 on 128 threads are 4 terms a sum, then a tree. Short sums round less.
    float dots[SIZE] = {}, squares[SIZE] = {};
    const int64_t chunks = args.d / SIZE;
    // 4, then 2, then 1, and no load under a condition: the compiler issues such a load only when its value is due.
    int64_t first = thread, mine = (chunks - thread + THREADS - 1) / THREADS;
    for (; mine >= IN_FLIGHT; mine -= IN_FLIGHT, first += IN_FLIGHT * THREADS)
        add_chunks<IN_FLIGHT, ALIGNED>(dots, squares, x, args.weight, first, THREADS);
    if (mine >= 2) {
        add_chunks<2, ALIGNED>(dots, squares, x, args.weight, first, THREADS);
        mine -= 2;
        first += 2 * THREADS;
    }
    if (mine == 1) add_chunks<1, ALIGNED>(dots, squares, x, args.weight, first, THREADS);
    // The last d % SIZE columns, one a thread.
    if (chunks * SIZE + thread < args.d) {
        const float value = to_float(x[chunks * SIZE + thread]);
        dots[0] += args.weight[chunks * SIZE + thread] * value;
        squares[0] += value * value;
    }

#pragma unroll
    for (int half = SIZE / 2; half > 0; half /= 2)
#pragma unroll
        for (int slot = 0; slot < half; ++slot) {
            dots[slot] += dots[slot + half];
            squares[slot] += squares[slot + half];
        }
    float dot = warp_sum(dots[0]), square = warp_sum(squares[0]);
    if constexpr (WARPS > 1) {
        __shared__ float partial[2][WARPS];
        if (thread % WARP == 0) {
            partial[0][thread / WARP] = dot;
            partial[1][thread / WARP] = square;
        }
        // Thread 0 reads what the other warps wrote.
        __syncthreads();
        dot = square = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            dot += partial[0][warp];
            square += partial[1][warp];
        }
    }
    if (thread == 0) {
        const float z = args.eps < 0 ? dot : dot / sqrtf(square / float(args.d) + args.eps);
        const float y = (z + args.bias) / args.temperature;
        args.out[row] = args.logit ? y : 1 / (1 + expf(-y));
    }
}

template <class T, int WARPS, class Launch>
void choose_alignment(const protector_harm_score_args &args, Launch &launch) {
    const int64_t blocks = (args.rows + 4 / WARPS - 1) / (4 / WARPS);
    const bool aligned = reinterpret_cast<uintptr_t>(args.hidden) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 &&
                         args.batch_stride * int64_t(sizeof(T)) % 16 == 0 && args.row_stride * int64_t(sizeof(T)) % 16 == 0;
    if (aligned) launch(harm_score_kernel<T, WARPS, true>, blocks, args);
    else launch(harm_score_kernel<T, WARPS, false>, blocks, args);
}

// By the length of a row alone, never by their number: a row's bits must not depend on its batch. 2048 bytes are what
// one warp holds in flight at once.
template <class T, class Launch>
void choose_warps(const protector_harm_score_args &args, Launch &launch) {
    if (args.d * int64_t(sizeof(T)) <= WARP * IN_FLIGHT * 16) choose_alignment<T, 1>(args, launch);
    else choose_alignment<T, 4>(args, launch);
}

// Calls launch(kernel, blocks, args) once, or not at all where there is nothing to do or args are wrong.
template <class Launch>
int choose_kernel(const protector_harm_score_args &args, Launch launch) {
    if (args.rows < 0 || args.rows > INT32_MAX || args.d < 1) return PROTECTOR_BAD_ARGUMENT;
    if (args.dtype < PROTECTOR_FP32 || args.dtype > PROTECTOR_BF16) return PROTECTOR_BAD_ARGUMENT;
    if (args.rows == 0) return PROTECTOR_OK;
    if (args.dtype == PROTECTOR_FP32) choose_warps<float>(args, launch);
    else if (args.dtype == PROTECTOR_FP16) choose_warps<__half>(args, launch);
    else choose_warps<__nv_bfloat16>(args, launch);
    return PROTECTOR_OK;
}

}  // namespace protector
