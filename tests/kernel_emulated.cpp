// Runs the real kernel body for every dtype, size and layout and compares it with fp64. Prints what failed; the exit
// status is 1 then. Each buffer is its own allocation of the exact size, so ASan sees a read one element too far.
#include "emulate_cuda.h"
#include "harm_score.cuh"

#include <memory>
#include <random>

static int failures;

#define CHECK(condition, ...)                                         \
    do {                                                              \
        if (!(condition)) {                                           \
            std::printf("%s: ", #condition);                          \
            std::printf(__VA_ARGS__);                                 \
            std::printf("\n");                                        \
            if (++failures == 20) std::exit(1);                       \
        }                                                             \
    } while (0)

static void store(float &to, float value) { to = value; }
static void store(__half &to, float value) { to.value = _Float16(value); }
static void store(__nv_bfloat16 &to, float value) {  // truncated: any bf16 will do
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to.bits = uint16_t(bits >> 16);
}
template <class T> constexpr int dtype_of = PROTECTOR_FP32;
template <> constexpr int dtype_of<__half> = PROTECTOR_FP16;
template <> constexpr int dtype_of<__nv_bfloat16> = PROTECTOR_BF16;

// `size` elements that start `offset` elements behind a 16-byte boundary and end with their allocation.
template <class T>
struct Buffer {
    std::unique_ptr<T[]> memory;
    T *data;
    Buffer(int64_t size, int offset) : memory(new T[size + offset]), data(memory.get() + offset) {}
};

static bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

static std::vector<float> run(protector_harm_score_args args, bool reversed) {
    std::vector<float> out(args.rows, -123.0f);  // no score is negative, so an unwritten row shows
    args.out = out.data();
    const int status = protector::choose_kernel(args, [&](auto kernel, int64_t blocks, const auto &arguments) {
        for (int64_t block = 0; block < blocks; ++block)
            emulated::run_block(unsigned(block), protector::BLOCK, reversed, [&] { kernel(arguments); });
    });
    CHECK(status == PROTECTOR_OK, "status %d", status);
    return out;
}

template <class T>
static double score_fp64(const protector_harm_score_args &args, int64_t row) {
    const int64_t position = args.index ? args.index[row] : row;
    const T *x = static_cast<const T *>(args.hidden) + row * args.batch_stride + position * args.row_stride;
    double dot = 0, square = 0;
    for (int64_t j = 0; j < args.d; ++j) {
        const double value = protector::to_float(x[j]);
        dot += args.weight[j] * value;
        square += value * value;
    }
    const double y = ((args.eps < 0 ? dot : dot / std::sqrt(square / args.d + double(args.eps))) + args.bias) / args.temperature;
    return args.logit ? y : 1 / (1 + std::exp(-y));
}

// `layout` 0: every token, 1: packed rows with an index, 2: padded (n, 3, d) with an index; `pad` elements between rows.
template <class T>
static void check(int64_t n, int64_t d, int layout, int offset, int pad, bool norm, bool logit) {
    std::mt19937 random(uint32_t(n * 7919 + d * 31 + layout));
    std::normal_distribution<float> normal;
    const int64_t tokens = layout == 2 ? 3 : 1, stride = d + pad, stored = n * tokens;
    Buffer<T> hidden(stored ? (stored - 1) * stride + d : 0, offset);
    Buffer<float> weight(d, offset);
    for (int64_t row = 0; row < stored; ++row)
        for (int64_t j = 0; j < d; ++j) store(hidden.data[row * stride + j], 3 * normal(random));
    for (int64_t j = 0; j < d; ++j) weight.data[j] = normal(random) / std::sqrt(float(d));
    std::vector<int64_t> index(n);
    for (int64_t row = 0; row < n; ++row) index[row] = random() % (layout == 2 ? tokens : std::max<int64_t>(n, 1));
    protector_harm_score_args args = {hidden.data, layout ? index.data() : nullptr, weight.data, nullptr,
                                      n, d, layout == 2 ? tokens : n, layout == 2 ? tokens * stride : 0, stride,
                                      0.25f, norm ? 1e-5f : -1.0f, 1.5f, dtype_of<T>, logit};
    const std::vector<float> out = run(args, false);
    const double tolerance = logit ? 1e-5 : 1e-6;
    for (int64_t row = 0; row < n; ++row) {
        const double expected = score_fp64<T>(args, row);
        CHECK(std::abs(out[row] - expected) <= tolerance, "bytes %zu n %lld d %lld layout %d offset %d row %lld: %.9g, fp64 %.9g",
              sizeof(T), (long long)n, (long long)d, layout, offset, (long long)row, out[row], expected);
    }
    if (n != 7) return;
    const std::vector<float> reversed = run(args, true);
    for (int64_t row = 0; row < n; ++row) {
        CHECK(same_bits(out[row], reversed[row]), "row %lld of d %lld depends on the order of threads", (long long)row, (long long)d);
        // Alone, and at another alignment: the same bits.
        Buffer<T> alone(d, (offset + 1) % 4);
        const int64_t position = layout ? index[row] : row;
        std::memcpy(alone.data, hidden.data + row * args.batch_stride + position * stride, d * sizeof(T));
        protector_harm_score_args single = args;
        single.hidden = alone.data;
        single.index = nullptr;
        single.rows = single.positions = 1;
        CHECK(same_bits(run(single, false)[0], out[row]), "row %lld of d %lld depends on its batch", (long long)row, (long long)d);
    }
    // NaN in, NaN out, for that row alone; an index outside is not read.
    store(hidden.data[d - 1], NAN);
    for (int64_t row = 0; row < n; ++row) index[row] = row % tokens;
    if (layout == 1)
        for (int64_t row = 0; row < n; ++row) index[row] = row;
    if (layout) index[n - 1] = args.positions, index[n - 2] = -1;
    const std::vector<float> poisoned = run(args, false);
    CHECK(std::isnan(poisoned[0]), "d %lld: a NaN was lost", (long long)d);
    for (int64_t row = 1; row < n; ++row)
        CHECK(std::isnan(poisoned[row]) == (layout && row >= n - 2), "d %lld layout %d row %lld", (long long)d, layout, (long long)row);
}

template <class T>
static void check_all(int largest_n) {
    for (int64_t d : {1, 8, 31, 64, 576, 1000, 4096, 4097})
        for (int64_t n : {0, 1, 7, 129}) {
            if (n > largest_n) continue;
            // A pad of 16 elements keeps rows of d % 8 == 0 aligned; offset 1 or pad 1 is the path without vector loads.
            check<T>(n, d, 0, 0, 16, true, false);
            check<T>(n, d, 1, 1, 0, false, true);
            if (n == 129) continue;
            check<T>(n, d, 2, 0, int(8 - d % 8), true, true);
            check<T>(n, d, 1, 0, 1, true, false);
            check<T>(n, d, 2, 0, 0, false, false);
        }
}

int main(int, char **argv) {
    const int largest_n = argv[1] ? std::atoi(argv[1]) : 129;
    check_all<float>(largest_n);
    check_all<__half>(largest_n);
    check_all<__nv_bfloat16>(largest_n);
    protector_harm_score_args args = {};
    auto never = [](auto, int64_t, const auto &) { CHECK(false, "launched"); };
    CHECK(protector::choose_kernel(args, never) == PROTECTOR_BAD_ARGUMENT, "d = 0");
    args.d = 1;
    args.dtype = 3;
    CHECK(protector::choose_kernel(args, never) == PROTECTOR_BAD_ARGUMENT, "dtype 3");
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
