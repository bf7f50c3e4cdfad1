// Attention of one new token per sequence, straight from the blocks of the paged cache.
//
// Nothing is gathered, padded or masked: every sequence reads the tokens that it has. Sums are float32. Numbers that
// are not finite stay so, and stay with their sequence.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float number) { return number; }

inline float widen(bfloat16 number) {
    uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float number, float& narrowed) { narrowed = number; }

inline void narrow(float number, bfloat16& narrowed) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    // Round to the nearest, ties to even; what is not a number must not round to infinity.
    narrowed.bits = std::isnan(number) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Compilers do not see through the loops below on their own: 16 numbers at a time, by GCC's and Clang's extension.
constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2), may_alias));

inline Lanes load(const float* numbers) { return *reinterpret_cast<const Lanes*>(numbers); }

inline Lanes load(const bfloat16* numbers) {
    const Halves halves = *reinterpret_cast<const Halves*>(numbers);
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

template <typename T>
inline float product(const float* left, const T* right, int64_t size) {
    Lanes lanes = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) lanes += load(left + i) * load(right + i);
    float sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += lanes[lane];
    for (; i < size; ++i) sum += left[i] * widen(right[i]);
    return sum;
}

template <typename T>
inline void accumulate(float* sums, float weight, const T* numbers, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) *reinterpret_cast<Lanes*>(sums + i) += weight * load(numbers + i);
    for (; i < size; ++i) sums[i] += weight * widen(numbers[i]);
}

struct Shape {
    int64_t sequences, heads, key_heads, key_size, value_size;
    int64_t page_size, table_width;
    int64_t query_head_stride, query_row_stride;
    int64_t window;  // 0: all tokens
};

// Calls action(token, slot) for the tokens of a sequence from `first` on; slots count the cache's tokens.
template <typename Action>
inline void each_token(const int64_t* table, int64_t first, int64_t length, int64_t page_size, Action action) {
    for (int64_t token = first; token < length;) {
        const int64_t page = token / page_size, end = std::min(length, (page + 1) * page_size);
        for (int64_t shift = (table[page] - page) * page_size; token < end; ++token) action(token, token + shift);
    }
}

template <typename T>
void decode(const T* queries, const T* keys, const T* values, T* output, const int64_t* tables, const int64_t* lengths,
            const Shape& shape, float scale) {
    const int64_t group = shape.heads / shape.key_heads, key_size = shape.key_size, value_size = shape.value_size;
    // The heads of a token lie side by side, and memory is fast where it is read in a row. So a task takes as many
    // heads of its sequence as leave enough tasks for all threads.
    const int64_t tasks_wanted = 4 * omp_get_max_threads();
    const int64_t key_heads = std::clamp<int64_t>(shape.key_heads * shape.sequences / tasks_wanted, 1, shape.key_heads);
    const int64_t parts = (shape.key_heads + key_heads - 1) / key_heads;
#pragma omp parallel
    {
        std::vector<float> query(group * key_heads * key_size), sums(group * key_heads * value_size), scores;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t sequence = 0; sequence < shape.sequences; ++sequence) {
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t length = lengths[sequence];
                const int64_t first = shape.window ? std::max<int64_t>(0, length - shape.window) : 0;
                const int64_t* table = tables + sequence * shape.table_width;
                const int64_t key_begin = part * key_heads, key_end = std::min(key_begin + key_heads, shape.key_heads);
                const int64_t begin = key_begin * group, heads = key_end * group - begin;
                for (int64_t head = 0; head < heads; ++head) {
                    const T* source =
                        queries + (begin + head) * shape.query_head_stride + sequence * shape.query_row_stride;
                    for (int64_t i = 0; i < key_size; ++i) query[head * key_size + i] = widen(source[i]) * scale;
                }
                scores.resize(heads * length);
                each_token(table, first, length, shape.page_size, [&](int64_t token, int64_t slot) {
                    const T* key = keys + (slot * shape.key_heads + key_begin) * key_size;
                    for (int64_t head = 0; head < heads; key += key_size) {
                        for (const int64_t next = head + group; head < next; ++head) {
                            scores[head * length + token] = product(&query[head * key_size], key, key_size);
                        }
                    }
                });
                for (int64_t head = 0; head < heads; ++head) {
                    float* row = scores.data() + head * length;
                    float highest = -std::numeric_limits<float>::infinity(), total = 0;
                    for (int64_t token = first; token < length; ++token) highest = std::max(highest, row[token]);
                    for (int64_t token = first; token < length; ++token) {
                        total += row[token] = std::exp(row[token] - highest);
                    }
                    for (int64_t token = first; token < length; ++token) row[token] /= total;
                }
                std::fill(sums.begin(), sums.end(), 0.0f);
                each_token(table, first, length, shape.page_size, [&](int64_t token, int64_t slot) {
                    const T* value = values + (slot * shape.key_heads + key_begin) * value_size;
                    for (int64_t head = 0; head < heads; value += value_size) {
                        for (const int64_t next = head + group; head < next; ++head) {
                            accumulate(&sums[head * value_size], scores[head * length + token], value, value_size);
                        }
                    }
                });
                T* target = output + (sequence * shape.heads + begin) * value_size;
                for (int64_t i = 0; i < heads * value_size; ++i) narrow(sums[i], target[i]);
            }
        }
    }
}

}  // namespace

extern "C" void decode_float32(const float* queries, const float* keys, const float* values, float* output,
                               const int64_t* tables, const int64_t* lengths, const Shape* shape, float scale) {
    decode(queries, keys, values, output, tables, lengths, *shape, scale);
}

extern "C" void decode_bfloat16(const bfloat16* queries, const bfloat16* keys, const bfloat16* values,
                                bfloat16* output, const int64_t* tables, const int64_t* lengths, const Shape* shape,
                                float scale) {
    decode(queries, keys, values, output, tables, lengths, *shape, scale);
}
