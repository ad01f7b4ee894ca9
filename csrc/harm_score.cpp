// CPU twin of harm_score.cuh: the same sums, 32 lanes wide, one thread. See harm_score.h for the equation.
#include "harm_score.h"

#include <cmath>
#include <cstring>
#include <limits>

// One binary, three instruction sets, chosen at load: needs GCC's target_clones and glibc's ifunc. Elsewhere (clang,
// MSVC, Arm, musl) the same loops are compiled once for the platform's baseline.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PROTECTOR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PROTECTOR_CLONES
#endif

// A clone only vectorises what is inlined into it.
#if defined(_MSC_VER)
#define PROTECTOR_INLINE __forceinline
#else
#define PROTECTOR_INLINE inline __attribute__((always_inline))
#endif

namespace {

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

PROTECTOR_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

PROTECTOR_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

PROTECTOR_INLINE float to_float(float value) { return value; }
PROTECTOR_INLINE float to_float(BFloat value) { return from_bits(uint32_t(value.bits) << 16); }

// Both cases are computed and one is kept, so the loop vectorises. No fp32 subnormal arises on the way (a host that
// flushes them would lose the small halves), and 31 + 224 = 255 keeps infinity and NaN what they are.
PROTECTOR_INLINE float to_float(Half value) {
    const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    const uint32_t normal = to_bits(from_bits(magnitude + (224u << 23)) * 0x1p-112f);
    const uint32_t subnormal = to_bits(from_bits((magnitude >> 13) | (126u << 23)) - 0.5f);
    return from_bits((magnitude < (1u << 23) ? subnormal : normal) | uint32_t(value.bits & 0x8000u) << 16);
}

constexpr int LANES = 32;

template <class T>
PROTECTOR_INLINE float score_row(const T *x, const protector_harm_score_args &args) {
    const float *weight = args.weight;
    float dot[LANES] = {}, square[LANES] = {};
    int64_t start = 0;
    for (; start + LANES <= args.d; start += LANES)
        for (int lane = 0; lane < LANES; ++lane) {
            const float value = to_float(x[start + lane]);
            dot[lane] += weight[start + lane] * value;
            square[lane] += value * value;
        }
    for (int lane = 0; start + lane < args.d; ++lane) {
        const float value = to_float(x[start + lane]);
        dot[lane] += weight[start + lane] * value;
        square[lane] += value * value;
    }
    // Once per row, so fp64 is free here and its rounding disappears.
    double dot_sum = 0, square_sum = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        dot_sum += dot[lane];
        square_sum += square[lane];
    }
    const double z = args.eps < 0 ? dot_sum : dot_sum / std::sqrt(square_sum / double(args.d) + args.eps);
    const double y = (z + args.bias) / args.temperature;
    return float(args.logit ? y : 1 / (1 + std::exp(-y)));
}

template <class T>
PROTECTOR_INLINE void score_rows(const protector_harm_score_args &args) {
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t position = args.index ? args.index[row] : row;
        const T *hidden = static_cast<const T *>(args.hidden);
        args.out[row] = position < 0 || position >= args.positions
                            ? std::numeric_limits<float>::quiet_NaN()
                            : score_row(hidden + row * args.batch_stride + position * args.row_stride, args);
    }
}

// target_clones takes no templates.
PROTECTOR_CLONES void score_fp32(const protector_harm_score_args &args) { score_rows<float>(args); }
PROTECTOR_CLONES void score_fp16(const protector_harm_score_args &args) { score_rows<Half>(args); }
PROTECTOR_CLONES void score_bf16(const protector_harm_score_args &args) { score_rows<BFloat>(args); }

}  // namespace

int protector_abi(void) { return PROTECTOR_ABI; }

int protector_harm_score_cpu(const protector_harm_score_args *args) {
    if (args->rows < 0 || args->d < 1) return PROTECTOR_BAD_ARGUMENT;
    switch (args->dtype) {
        case PROTECTOR_FP32: score_fp32(*args); return PROTECTOR_OK;
        case PROTECTOR_FP16: score_fp16(*args); return PROTECTOR_OK;
        case PROTECTOR_BF16: score_bf16(*args); return PROTECTOR_OK;
        default: return PROTECTOR_BAD_ARGUMENT;
    }
}

// harm_score.cu has these three where nvcc built it.
#ifndef PROTECTOR_WITH_CUDA
int protector_has_cuda(void) { return 0; }

int protector_harm_score_cuda(const protector_harm_score_args *, int, void *) { return PROTECTOR_NO_CUDA; }

const char *protector_status_text(int status) {
    return status == PROTECTOR_OK             ? "ok"
           : status == PROTECTOR_BAD_ARGUMENT ? "bad argument"
           : status == PROTECTOR_NO_CUDA      ? "built without CUDA"
                                              : "unknown status";
}
#endif
