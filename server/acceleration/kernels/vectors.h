// Vectors of 8 channels, their functions, and the product of a few rows with a panel of a weight.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int64_t LANES = 8;
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

inline vector load(const float* source) { return *reinterpret_cast<const vector*>(source); }
inline void store(float* target, vector values) { *reinterpret_cast<vector*>(target) = values; }

// Memory of one thread that stays from call to call: allocating some megabytes every time causes page faults.
struct Scratch {
    float* data = nullptr;
    int64_t size = 0;

    float* reserve(int64_t floats) {
        if (floats > size) {
            std::free(data);
            size = floats;
            data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

// Exponential of x <= 0 within two units in the last place: a power of two times a Taylor series around 0.
inline vector exponential(vector x) {
    x = x < -87.0f ? vector{} - 87.0f : x;
    const vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23, which rounds to an integer
    const vector power = shifted - 12582912.0f;
    const vector rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    vector series = rest * (1.0f / 5040) + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest * rest + rest + 1.0f;
    const integers scale = (__builtin_convertvector(power, integers) + 127) << 23;
    return series * reinterpret_cast<const vector&>(scale);
}

inline vector magnitude(vector x) { return x < 0.0f ? -x : x; }

inline vector silu(vector x) {
    const vector power = exponential(-magnitude(x));
    return x * (x < 0.0f ? power : vector{} + 1.0f) / (1.0f + power);
}

// Normal CDF by formula 26.2.17 of Abramowitz and Stegun (1964), within 7.5e-8.
inline vector normal_cdf(vector x) {
    const vector t = 1.0f / (1.0f + 0.2316419f * magnitude(x));
    vector series = 1.330274429f * t - 1.821255978f;
    series = series * t + 1.781477937f;
    series = series * t - 0.356563782f;
    series = (series * t + 0.319381530f) * t;
    const vector tail = 0.3989422804f * exponential(-0.5f * x * x) * series;
    return x > 0.0f ? 1.0f - tail : tail;
}

constexpr int64_t PANEL = 2 * LANES;  // columns of a weight that lie together

// Multiply (ROWS, channels) by a panel (channels, PANEL) and add the bias, if given. The sums stay in registers.
template <int ROWS>
inline void multiply(
    const float* rows, int64_t channels, const float* panel, const float* bias, float* result, int64_t stride
) {
    vector low[ROWS] = {}, high[ROWS] = {};
    if (bias)
        for (int row = 0; row < ROWS; ++row) low[row] = load(bias), high[row] = load(bias + LANES);
    for (int64_t channel = 0; channel < channels; ++channel, panel += PANEL) {
        const vector first = load(panel), second = load(panel + LANES);
        for (int row = 0; row < ROWS; ++row) {
            const float factor = rows[row * channels + channel];
            low[row] += factor * first;
            high[row] += factor * second;
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        store(result + row * stride, low[row]);
        store(result + row * stride + LANES, high[row]);
    }
}

void multiply(
    int64_t count, const float* rows, int64_t channels, const float* panel, const float* bias, float* result,
    int64_t stride
) {
    const int64_t blocks = (count + 5) / 6;  // of similar size: few rows leave the FMA units waiting for the sum before
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = count * block / blocks;
        const float* source = rows + first * channels;
        float* target = result + first * stride;
        switch (count * (block + 1) / blocks - first) {
            case 6: multiply<6>(source, channels, panel, bias, target, stride); break;
            case 5: multiply<5>(source, channels, panel, bias, target, stride); break;
            case 4: multiply<4>(source, channels, panel, bias, target, stride); break;
            case 3: multiply<3>(source, channels, panel, bias, target, stride); break;
            case 2: multiply<2>(source, channels, panel, bias, target, stride); break;
            case 1: multiply<1>(source, channels, panel, bias, target, stride); break;
        }
    }
}

}  // namespace
