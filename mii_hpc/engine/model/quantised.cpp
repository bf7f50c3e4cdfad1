// Products of rows with the weights of a linear layer in 8 or 4 bits, which are widened as they are read.
//
// Sums are float32. Inputs are a multiple of 32.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16, GROUP = 32;
// So many outputs share what is read of the rows; so many inputs of them, widened, stay in the nearest cache.
constexpr int64_t OUTPUTS = 4, INPUTS = 1024;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int8_t Signed __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Lanes load(const float* numbers) { return *reinterpret_cast<const Lanes*>(numbers); }
inline void store(float* numbers, Lanes lanes) { *reinterpret_cast<Lanes*>(numbers) = lanes; }

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

    void widen(int64_t output, int64_t first, int64_t size, float* wide) const {
        const int8_t* row = weights + output * inputs + first;
        for (int64_t i = 0; i < size; i += LANES) {
            store(wide + i, __builtin_convertvector(*reinterpret_cast<const Signed*>(row + i), Lanes));
        }
    }
    float scale(int64_t output) const { return scales[output]; }
};

// Four bits of exponent, with a bias of 7 instead of 127, and three of mantissa; subnormal numbers as well.
struct Float8 {
    const uint8_t* weights;
    const float* scales;
    int64_t inputs;

    void widen(int64_t output, int64_t first, int64_t size, float* wide) const {
        const uint8_t* row = weights + output * inputs + first;
        for (int64_t i = 0; i < size; i += LANES) {
            const Bits bits = __builtin_convertvector(*reinterpret_cast<const Bytes*>(row + i), Bits);
            store(wide + i, (Lanes)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f);
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

    void widen(int64_t output, int64_t first, int64_t size, float* wide) const {
        const uint8_t* row = weights + (output * inputs + first) / 2;
        const uint16_t* scale = scales + (output * inputs + first) / GROUP * 2;
        for (int64_t i = 0; i < size; i += GROUP, scale += 2) {
            const Bytes bytes = *reinterpret_cast<const Bytes*>(row + i / 2);
            const float step = bfloat16(scale), lowest = bfloat16(scale + 1);
            store(wide + i, __builtin_convertvector(bytes & 15, Lanes) * step + lowest);
            store(wide + i + LANES, __builtin_convertvector(bytes >> 4, Lanes) * step + lowest);
        }
    }
    float scale(int64_t) const { return 1; }
};

inline float sum(Lanes lanes) {
    float total = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) total += lanes[lane];
    return total;
}

// Adds up the products of ROWS rows with OUTPUTS outputs, whose weights are INPUTS apart.
template <int ROWS>
inline void multiply(const float* rows, int64_t stride, const float* wide, int64_t size, float* sums) {
    Lanes lanes[ROWS][OUTPUTS] = {};
    for (int64_t i = 0; i < size; i += LANES) {
        for (int row = 0; row < ROWS; ++row) {
            const Lanes numbers = load(rows + row * stride + i);
            for (int64_t output = 0; output < OUTPUTS; ++output) {
                lanes[row][output] += numbers * load(wide + output * INPUTS + i);
            }
        }
    }
    for (int row = 0; row < ROWS; ++row) {
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
                for (; row + 4 <= count; row += 4) {
                    multiply<4>(rows + row * inputs + first, inputs, wide.data(), size, &sums[row * OUTPUTS]);
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
