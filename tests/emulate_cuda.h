// Enough of CUDA to run csrc/harm_score.cuh on the CPU, one block at a time, under a sanitizer.
//
// Each CUDA thread is a fiber that runs until it waits. So a schedule is fixed and known, and a missing barrier shows as
// a wrong number every time, not as a race that a run may or may not meet: give two opposite schedules and compare.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct dim3 { unsigned x = 0, y = 0, z = 0; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct __half { _Float16 value; };
struct __nv_bfloat16 { uint16_t bits; };

inline float __half2float(__half half) { return float(half.value); }
inline float __bfloat162float(__nv_bfloat16 bfloat) {
    const uint32_t bits = uint32_t(bfloat.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
// UBSan's alignment check makes a misaligned 16-byte load as fatal here as on the device.
template <class T> T __ldcs(const T *from) { return *from; }
template <class T> T __ldg(const T *from) { return *from; }

inline dim3 threadIdx, blockIdx;

namespace emulated {

constexpr int WARP = 32;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(32 * 1024);
    bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current, waiting_block, finished;
inline int64_t block_generation;
inline std::vector<int> waiting_warp;
inline std::vector<int64_t> warp_generation;
inline std::vector<float> shuffled;
inline bool progressed;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

// All `expected` fibers must come; the last one opens the gate.
inline void wait(int &waiting, int64_t &generation, int expected) {
    const int64_t mine = generation;
    progressed = true;
    if (++waiting == expected) {
        waiting = 0;
        ++generation;
        return;
    }
    while (generation == mine) yield();
}

inline void entry() {
    body();
    fibers[current].done = true;
    ++finished;
    progressed = true;
    for (;;) yield();
}

// Runs one block; `reversed` starts with the last thread. Exits with a message where no fiber can go on.
inline void run_block(unsigned block, int threads, bool reversed, std::function<void()> kernel) {
    body = std::move(kernel);
    fibers.resize(threads);
    waiting_warp.assign(threads / WARP, 0);
    warp_generation.assign(threads / WARP, 0);
    shuffled.assign(threads, NAN);
    waiting_block = finished = 0;
    blockIdx.x = block;
    for (Fiber &fiber : fibers) {
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, entry, 0);
    }
    while (finished < threads) {
        progressed = false;
        for (int turn = 0; turn < threads; ++turn) {
            current = reversed ? threads - 1 - turn : turn;
            if (fibers[current].done) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current].context);
        }
        if (!progressed) {
            std::printf("deadlock in block %u: %d of %d threads finished\n", block, finished, threads);
            std::exit(1);
        }
    }
}

}  // namespace emulated

inline void __syncthreads() {
    emulated::wait(emulated::waiting_block, emulated::block_generation, int(emulated::fibers.size()));
}

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    const int thread = emulated::current, warp = thread / emulated::WARP;
    emulated::shuffled[thread] = value;
    emulated::wait(emulated::waiting_warp[warp], emulated::warp_generation[warp], emulated::WARP);
    const float other = emulated::shuffled[thread ^ offset];
    emulated::wait(emulated::waiting_warp[warp], emulated::warp_generation[warp], emulated::WARP);
    return other;
}
