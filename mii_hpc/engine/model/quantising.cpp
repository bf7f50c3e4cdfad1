// Products of rows with the weights of a linear layer in 8 or 4 bits, which are widened as they are read.
//
// Sums are float32. Inputs are a multiple of 32.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t GROUP = 32;
// So many outputs share what is read of the rows; so many inputs of them, widened, stay in the nearest cache.
constexpr int64_t OUTPUTS = 4, INPUTS = 1024;
// As many sums as there are registers for.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 4;
#else
constexpr int64_t LANES = 8, ROWS = 2;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef uint8_t Halves __attribute__((vector_size(GROUP / 2), aligned(1), may_alias));

inline Lanes load(const float* numbers) { return *reinterpret_cast<const Lanes*>(numbers); }

inline float bfloat16(const uint16_t* bits) {
    const uint32_t wide = static_cast<uint32_t>(*bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
}

// Each format widens `size` weights of one output, from input `first` on, and says what a sum is multiplied with.

struct Int8 {
    const int8_t* weights;
    const float* scales;
    int64_t inputs;

    void widen(int64_t output, int64_t first, int64_t size, float* __restrict wide) const {
        const int8_t* row = weights + output * inputs + first;
        for (int64_t i = 0; i < size; ++i) wide[i] = row[i];
    }
    float scale(int64_t output) const { return scales[output]; }
};

// Four bits of exponent, with a bias of 7 instead of 127, and three of mantissa; subnormal numbers as well.
struct Float8 {
    const uint8_t* weights;
    const float* scales;
    int64_t inputs;

    void widen(int64_t output, int64_t first, int64_t size, float* __restrict wide) const {
        const uint8_t* row = weights + output * inputs + first;
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t bits = (row[i] & 0x80u) << 24 | (row[i] & 0x7fu) << 20;
            float number;
            std::memcpy(&number, &bits, sizeof number);
            wide[i] = number * 0x1p120f;
        }
    }
    float scale(int64_t output) const { return scales[output]; }
};

// Groups of 32, each with its step and its lowest weight. Byte i of a group has weight i in its lower half, and weight
// 16 + i in its upper one.
struct Int4 {
    const uint8_t* weights;
    const uint16_t* scales;
    int64_t inputs;

    void widen(int64_t output, int64_t first, int64_t size, float* __restrict wide) const {
        const uint8_t* row = weights + (output * inputs + first) / 2;
        const uint16_t* scale = scales + (output * inputs + first) / GROUP * 2;
        uint8_t steps[INPUTS];
        for (int64_t i = 0; i < size; i += GROUP) {
            const Halves halves = *reinterpret_cast<const Halves*>(row + i / 2);
            *reinterpret_cast<Halves*>(steps + i) = halves & 15;
            *reinterpret_cast<Halves*>(steps + i + GROUP / 2) = halves >> 4;
        }
        for (int64_t i = 0; i < size; ++i) wide[i] = steps[i];
        for (int64_t i = 0; i < size; i += LANES) {
            const float* group = wide + i;
            const uint16_t* step = scale + i / GROUP * 2;
            *reinterpret_cast<Lanes*>(wide + i) = load(group) * bfloat16(step) + bfloat16(step + 1);
        }
    }
    float scale(int64_t) const { return 1; }
};

inline float sum(Lanes lanes) {
    float total = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) total += lanes[lane];
    return total;
}

// Adds up the products of COUNT rows with OUTPUTS outputs, whose weights are INPUTS apart.
template <int64_t COUNT>
inline void multiply(const float* rows, int64_t stride, const float* wide, int64_t size, float* sums) {
    Lanes lanes[COUNT][OUTPUTS] = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes weights[OUTPUTS];
        for (int64_t output = 0; output < OUTPUTS; ++output) weights[output] = load(wide + output * INPUTS + i);
        for (int64_t row = 0; row < COUNT; ++row) {
            const Lanes numbers = load(rows + row * stride + i);
            for (int64_t output = 0; output < OUTPUTS; ++output) lanes[row][output] += numbers * weights[output];
        }
    }
    for (int64_t row = 0; row < COUNT; ++row) {
        for (int64_t output = 0; output < OUTPUTS; ++output) sums[row * OUTPUTS + output] += sum(lanes[row][output]);
    }
}

template <typename Format>
void product(const Format& format, const float* rows, float* result, int64_t count, int64_t outputs) {
    const int64_t inputs = format.inputs;
#pragma omp parallel
    {
        std::vector<float> wide(OUTPUTS * INPUTS), sums(count * OUTPUTS);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (outputs + OUTPUTS - 1) / OUTPUTS; ++block) {
            const int64_t begin = block * OUTPUTS, here = std::min(OUTPUTS, outputs - begin);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t first = 0; first < inputs; first += INPUTS) {
                const int64_t size = std::min(INPUTS, inputs - first);
                for (int64_t i = 0; i < here; ++i) format.widen(begin + i, first, size, &wide[i * INPUTS]);
                int64_t row = 0;
                for (; row + ROWS <= count; row += ROWS) {
                    multiply<ROWS>(rows + row * inputs + first, inputs, wide.data(), size, &sums[row * OUTPUTS]);
                }
                for (; row < count; ++row) {
                    multiply<1>(rows + row * inputs + first, inputs, wide.data(), size, &sums[row * OUTPUTS]);
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                for (int64_t i = 0; i < here; ++i) {
                    result[row * outputs + begin + i] = sums[row * OUTPUTS + i] * format.scale(begin + i);
                }
            }
        }
    }
}

}  // namespace

extern "C" void product_int8(const float* rows, const int8_t* weights, const float* scales, float* result,
                             int64_t count, int64_t inputs, int64_t outputs) {
    product(Int8{weights, scales, inputs}, rows, result, count, outputs);
}

extern "C" void product_fp8(const float* rows, const uint8_t* weights, const float* scales, float* result,
                            int64_t count, int64_t inputs, int64_t outputs) {
    product(Float8{weights, scales, inputs}, rows, result, count, outputs);
}

extern "C" void product_int4(const float* rows, const uint8_t* weights, const uint16_t* scales, float* result,
                             int64_t count, int64_t inputs, int64_t outputs) {
    product(Int4{weights, scales, inputs}, rows, result, count, outputs);
}
