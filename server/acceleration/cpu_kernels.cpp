// What `cpu_kernels.py` says, over images in the order (batch, height, width, channels) and in fp32.
//
// Every number is made by the same operations in the same order whatever its neighbours are and however many threads
// share the work: sums go channel by channel, or place by place of a part of an image that is always the same.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int64_t LANES = 8;
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

inline vector load(const float* from) { return *reinterpret_cast<const vector*>(from); }
inline void store(float* to, vector values) { *reinterpret_cast<vector*>(to) = values; }

// A thread's own memory, kept from call to call: to ask for some megabytes anew takes page faults.
struct Room {
    float* at = nullptr;
    int64_t size = 0;

    float* of(int64_t floats) {
        if (floats > size) {
            std::free(at);
            size = floats;
            at = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
        }
        return at;
    }
    ~Room() { std::free(at); }
};
thread_local Room room;

// Of numbers up to 0, within two units in the last place: a power of two and a Taylor series around 0.
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

// The cumulative normal distribution, by formula 26.2.17 of Abramowitz and Stegun (1964), within 7.5e-8.
inline vector normal(vector x) {
    const vector t = 1.0f / (1.0f + 0.2316419f * magnitude(x));
    vector series = 1.330274429f * t - 1.821255978f;
    series = series * t + 1.781477937f;
    series = series * t - 0.356563782f;
    series = (series * t + 0.319381530f) * t;
    const vector tail = 0.3989422804f * exponential(-0.5f * x * x) * series;
    return x > 0.0f ? 1.0f - tail : tail;
}

constexpr int64_t PANEL = 2 * LANES;  // columns of weights that lie together

// (ROWS, channels) times a panel (channels, PANEL), plus a bias if so: the sums stay in registers.
template <int ROWS>
inline void multiply(
    const float* rows, int64_t channels, const float* panel, const float* bias, float* result, int64_t outputs
) {
    vector low[ROWS] = {}, high[ROWS] = {};
    if (bias)
        for (int row = 0; row < ROWS; ++row) low[row] = load(bias), high[row] = load(bias + LANES);
    for (int64_t channel = 0; channel < channels; ++channel, panel += PANEL) {
        const vector first = load(panel), second = load(panel + LANES);
        for (int row = 0; row < ROWS; ++row) {
            const float by = rows[row * channels + channel];
            low[row] += by * first;
            high[row] += by * second;
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        store(result + row * outputs, low[row]);
        store(result + row * outputs + LANES, high[row]);
    }
}

void multiply(
    int64_t count, const float* rows, int64_t channels, const float* panel, const float* bias, float* result,
    int64_t outputs
) {
    const int64_t blocks = (count + 5) / 6;  // of like size: a sum waits for the one before unless others go on
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = count * block / blocks;
        const float* from = rows + first * channels;
        float* to = result + first * outputs;
        switch (count * (block + 1) / blocks - first) {
            case 6: multiply<6>(from, channels, panel, bias, to, outputs); break;
            case 5: multiply<5>(from, channels, panel, bias, to, outputs); break;
            case 4: multiply<4>(from, channels, panel, bias, to, outputs); break;
            case 3: multiply<3>(from, channels, panel, bias, to, outputs); break;
            case 2: multiply<2>(from, channels, panel, bias, to, outputs); break;
            case 1: multiply<1>(from, channels, panel, bias, to, outputs); break;
        }
    }
}

// Lavin and Gray's transforms of a line of 6 pixels, and back to 4.
inline void forth(const vector d[6], vector t[6]) {
    const vector a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] - 5 * d[2] + d[4];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = 4 * d[1] - 5 * d[3] + d[5];
}

inline void back(const vector m[6], vector y[4]) {
    const vector a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
    y[0] = m[0] + a + c;
    y[1] = b + 2 * e;
    y[2] = a + 4 * c;
    y[3] = b + 8 * e + m[5];
}

constexpr int64_t AT_ONCE = 48;  // tiles: enough to read weights seldom, and few enough for the cache
constexpr int64_t FEW = 24;      // tiles for a thread, of which weights take longer to read than pixels to transform
constexpr int64_t ROWS_AT_ONCE = 64;  // of a linear layer, at once
constexpr int64_t PLACES = 64;   // of a part of an image, which are read twice, the second time from the cache

// Of each of WIDE vectors of channels the mean over so many places, and the sum of squared differences from it.
template <int WIDE>
inline void moments(const float* from, int64_t count, int64_t channels, float* means) {
    vector sums[WIDE] = {}, squares[WIDE] = {};
    for (int64_t place = 0; place < count; ++place)
        for (int at = 0; at < WIDE; ++at) sums[at] += load(from + place * channels + at * LANES);
    for (int at = 0; at < WIDE; ++at) sums[at] /= static_cast<float>(count);
    for (int64_t place = 0; place < count; ++place)
        for (int at = 0; at < WIDE; ++at) {
            const vector away = load(from + place * channels + at * LANES) - sums[at];
            squares[at] += away * away;
        }
    for (int at = 0; at < WIDE; ++at) {
        store(means + at * LANES, sums[at]);
        store(means + channels + at * LANES, squares[at]);
    }
}

}  // namespace

extern "C" {

// weight is (36, outputs / PANEL, channels, PANEL)
void winograd(
    const float* images, const float* weight, const float* bias, int64_t bias_stride, const float* kept, float* result,
    int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs, int threads
) {
    const int64_t down = (height + 3) / 4, across = (width + 3) / 4, tiles = batch * down * across;
    const int64_t panels = outputs / PANEL;
    const int64_t shares = tiles < FEW * threads ? std::min<int64_t>(panels, threads) : 1;
    int64_t parts = (tiles + AT_ONCE - 1) / AT_ONCE;
    if (shares == 1) parts = (parts + threads - 1) / threads * threads;
    const int64_t most = (tiles + parts - 1) / parts;
    const int64_t of_turned = most * channels + 16;  // so that 36 of them do not fall to the same lines of a cache
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t share = 0; share < shares; ++share) {
            const int64_t first = tiles * part / parts, count = tiles * (part + 1) / parts - first;
            const int64_t begin = panels * share / shares, end = panels * (share + 1) / shares;
            const int64_t wide = (end - begin) * PANEL, of_product = most * wide + 16;
            float* turned = room.of(36 * (of_turned + of_product) + channels);
            float* products = turned + 36 * of_turned;
            float* zeros = products + 36 * of_product;
            std::memset(zeros, 0, channels * sizeof(float));

            for (int64_t tile = 0; tile < count; ++tile) {
                const int64_t at = first + tile, image = at / (down * across);
                const int64_t top = at / across % down * 4 - 1, left = at % across * 4 - 1;
                const float* pixels[6][6];
                for (int64_t y = 0; y < 6; ++y)
                    for (int64_t x = 0; x < 6; ++x) {
                        const int64_t line = top + y, column = left + x;
                        const bool inside = line >= 0 && line < height && column >= 0 && column < width;
                        pixels[y][x] = inside ? images + ((image * height + line) * width + column) * channels : zeros;
                    }
                for (int64_t channel = 0; channel < channels; channel += LANES) {
                    vector half[6][6];
                    for (int x = 0; x < 6; ++x) {
                        vector d[6], t[6];
                        for (int y = 0; y < 6; ++y) d[y] = load(pixels[y][x] + channel);
                        forth(d, t);
                        for (int y = 0; y < 6; ++y) half[y][x] = t[y];
                    }
                    float* to = turned + tile * channels + channel;
                    for (int y = 0; y < 6; ++y) {
                        vector t[6];
                        forth(half[y], t);
                        for (int x = 0; x < 6; ++x) store(to + (y * 6 + x) * of_turned, t[x]);
                    }
                }
            }

            for (int64_t place = 0; place < 36; ++place)
                for (int64_t panel = begin; panel < end; ++panel)
                    multiply(
                        count, turned + place * of_turned, channels,
                        weight + (place * panels + panel) * channels * PANEL, nullptr,
                        products + place * of_product + (panel - begin) * PANEL, wide
                    );

            for (int64_t tile = 0; tile < count; ++tile) {
                const int64_t at = first + tile, image = at / (down * across);
                const int64_t top = at / across % down * 4, left = at % across * 4;
                const int64_t lines = std::min<int64_t>(4, height - top), columns = std::min<int64_t>(4, width - left);
                for (int64_t output = 0; output < wide; output += LANES) {
                    vector half[4][6];
                    const float* from = products + tile * wide + output;
                    for (int x = 0; x < 6; ++x) {
                        vector m[6], y[4];
                        for (int line = 0; line < 6; ++line) m[line] = load(from + (line * 6 + x) * of_product);
                        back(m, y);
                        for (int line = 0; line < 4; ++line) half[line][x] = y[line];
                    }
                    const int64_t channel = begin * PANEL + output;
                    const vector added = bias ? load(bias + image * bias_stride + channel) : vector{};
                    for (int64_t line = 0; line < lines; ++line) {
                        vector y[4];
                        back(half[line], y);
                        const int64_t to = ((image * height + top + line) * width + left) * outputs + channel;
                        for (int64_t x = 0; x < columns; ++x) {
                            const vector value = y[x] + added;
                            store(result + to + x * outputs, kept ? value + load(kept + to + x * outputs) : value);
                        }
                    }
                }
            }
        }
}

void group_norm(
    const float* images, const float* shift, int64_t shift_stride, const float* weight, const float* bias,
    float* result, int64_t batch, int64_t places, int64_t channels, int64_t groups, float eps, int with_silu,
    int threads
) {
    const int64_t parts = (places + PLACES - 1) / PLACES, wide = channels / groups;
    float* const moments_of = room.of(2 * batch * (parts + 1) * channels);
    float* const affine = moments_of + 2 * batch * parts * channels;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < batch * parts; ++at) {
            const int64_t first = at % parts * PLACES, count = std::min(PLACES, places - first);
            const float* from = images + (at / parts * places + first) * channels;
            float* means = moments_of + 2 * at * channels;
            int64_t channel = 0;
            for (; channel + 4 * LANES <= channels; channel += 4 * LANES)
                moments<4>(from + channel, count, channels, means + channel);
            for (; channel < channels; channel += LANES) moments<1>(from + channel, count, channels, means + channel);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < batch * groups; ++at) {
            const int64_t image = at / groups, begin = at % groups * wide;
            const float* means = moments_of + 2 * image * parts * channels;
            const float* moved = shift ? shift + image * shift_stride : nullptr;
            double middle = 0, spread = 0;
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t channel = begin; channel < begin + wide; ++channel) {
                    const double mean = means[2 * part * channels + channel] + (moved ? moved[channel] : 0.0);
                    middle += mean * std::min(PLACES, places - part * PLACES);
                }
            middle /= places * wide;
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t channel = begin; channel < begin + wide; ++channel) {
                    const float* of_channel = means + 2 * part * channels + channel;
                    const double away = of_channel[0] + (moved ? moved[channel] : 0.0) - middle;
                    spread += of_channel[channels] + away * away * std::min(PLACES, places - part * PLACES);
                }
            const double factor = 1 / std::sqrt(spread / (places * wide) + eps);
            for (int64_t channel = begin; channel < begin + wide; ++channel) {
                const double by = factor * weight[channel];
                affine[2 * image * channels + channel] = by;
                affine[(2 * image + 1) * channels + channel] =
                    bias[channel] + ((moved ? moved[channel] : 0.0) - middle) * by;
            }
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < batch * parts; ++at) {
            const int64_t image = at / parts, first = at % parts * PLACES, count = std::min(PLACES, places - first);
            const float *by = affine + 2 * image * channels, *added = by + channels;
            const int64_t begin = (image * places + first) * channels;
            for (int64_t place = begin; place < begin + count * channels; place += channels)
                for (int64_t channel = 0; channel < channels; channel += LANES) {
                    const vector normed = load(images + place + channel) * load(by + channel) + load(added + channel);
                    store(result + place + channel, with_silu ? silu(normed) : normed);
                }
        }
    }
}

void layer_norm(
    const float* values, const float* more, const float* weight, const float* bias, float* total, float* result,
    int64_t rows, int64_t width, float eps, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = values + row * width;
        vector sum = {}, squares = {};
        for (int64_t at = 0; at < width; at += LANES) {
            vector value = load(from + at);
            if (more) store(total + row * width + at, value += load(more + row * width + at));
            sum += value;
        }
        if (more) from = total + row * width;
        float middle = 0, spread = 0;
        for (int64_t lane = 0; lane < LANES; ++lane) middle += sum[lane];
        middle /= width;
        for (int64_t at = 0; at < width; at += LANES) {
            const vector away = load(from + at) - middle;
            squares += away * away;
        }
        for (int64_t lane = 0; lane < LANES; ++lane) spread += squares[lane];
        const float factor = 1 / std::sqrt(spread / width + eps);
        for (int64_t at = 0; at < width; at += LANES)
            store(result + row * width + at, (load(from + at) - middle) * factor * load(weight + at) + load(bias + at));
    }
}

// Of heads of 2 * PANEL channels. Those of a query or a token lie side by side; strides are of images and of these.
void attention(
    const float* queries, int64_t of_queries, int64_t of_query, const float* keys, int64_t of_keys, int64_t of_key,
    const float* values, int64_t of_values, int64_t of_value, float* result, int64_t batch, int64_t heads,
    int64_t places, int64_t tokens, int threads
) {
    constexpr int64_t HEAD = 2 * PANEL, QUERIES = 128;  // of one part, which lays out keys and values for itself
    const int64_t parts = (places + QUERIES - 1) / QUERIES, width = heads * HEAD;
    const int64_t whole = (tokens + PANEL - 1) / PANEL * PANEL;
    const float scale = 1 / std::sqrt(static_cast<float>(HEAD));
#pragma omp parallel for num_threads(threads) schedule(static) collapse(3)
    for (int64_t image = 0; image < batch; ++image)
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t first = part * QUERIES, many = std::min(QUERIES, places - first), at = head * HEAD;
                float* asked = room.of(QUERIES * HEAD + 2 * whole * HEAD + QUERIES * whole);
                float* key_panels = asked + QUERIES * HEAD;
                float* value_panels = key_panels + whole * HEAD;
                float* weights = value_panels + whole * HEAD;
                for (int64_t query = 0; query < many; ++query) {
                    const float* from = queries + image * of_queries + (first + query) * of_query + at;
                    for (int64_t channel = 0; channel < HEAD; channel += LANES)
                        store(asked + query * HEAD + channel, scale * load(from + channel));
                }
                std::memset(key_panels, 0, 2 * whole * HEAD * sizeof(float));
                for (int64_t token = 0; token < tokens; ++token) {
                    const float* key = keys + image * of_keys + token * of_key + at;
                    const float* value = values + image * of_values + token * of_value + at;
                    float* column = key_panels + token / PANEL * PANEL * HEAD + token % PANEL;
                    for (int64_t channel = 0; channel < HEAD; ++channel) column[channel * PANEL] = key[channel];
                    for (int64_t half = 0; half < 2; ++half)
                        std::memcpy(
                            value_panels + (half * whole + token) * PANEL, value + half * PANEL, PANEL * sizeof(float)
                        );
                }
                for (int64_t token = 0; token < whole; token += PANEL)
                    multiply(many, asked, HEAD, key_panels + token * HEAD, nullptr, weights + token, whole);
                for (int64_t query = 0; query < many; ++query) {
                    float* row = weights + query * whole;
                    for (int64_t token = tokens; token < whole; ++token) row[token] = -INFINITY;
                    vector highest = load(row), sum = {};
                    for (int64_t token = LANES; token < whole; token += LANES) {
                        const vector here = load(row + token);
                        highest = here > highest ? here : highest;
                    }
                    float most = highest[0], total = 0;
                    for (int64_t lane = 1; lane < LANES; ++lane) most = std::max(most, highest[lane]);
                    for (int64_t token = 0; token < whole; token += LANES) {
                        const vector weight = exponential(load(row + token) - most);
                        store(row + token, weight);
                        sum += weight;
                    }
                    for (int64_t lane = 0; lane < LANES; ++lane) total += sum[lane];
                    for (int64_t token = 0; token < whole; token += LANES)
                        store(row + token, load(row + token) * (1 / total));
                }
                float* to = result + (image * places + first) * width + at;
                for (int64_t half = 0; half < 2; ++half)
                    multiply(
                        many, weights, whole, value_panels + half * whole * PANEL, nullptr, to + half * PANEL, width
                    );
            }
}

void gated_gelu(const float* values, float* result, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *linear = values + 2 * row * width, *gate = linear + width;
        for (int64_t at = 0; at < width; at += LANES)
            store(result + row * width + at, load(linear + at) * load(gate + at) * normal(load(gate + at)));
    }
}

// weight is (outputs / PANEL, channels, PANEL)
void linear(
    const float* rows, const float* weight, const float* bias, float* result, int64_t count, int64_t channels,
    int64_t outputs, int threads
) {
    const int64_t panels = outputs / PANEL, parts = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t first = part * ROWS_AT_ONCE, output = panel * PANEL;
            multiply(
                std::min(ROWS_AT_ONCE, count - first), rows + first * channels, channels, weight + output * channels,
                bias ? bias + output : nullptr, result + first * outputs + output, outputs
            );
        }
}

// The first half of what is made is multiplied by the GELU of the second.
void gated_linear(
    const float* rows, const float* weight, const float* bias, float* result, int64_t count, int64_t channels,
    int64_t width, int threads
) {
    const int64_t panels = width / PANEL, parts = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t first = part * ROWS_AT_ONCE, many = std::min(ROWS_AT_ONCE, count - first), output = panel * PANEL;
            const float* from = rows + first * channels;
            float made[ROWS_AT_ONCE * PANEL], gate[ROWS_AT_ONCE * PANEL];
            multiply(many, from, channels, weight + output * channels, bias ? bias + output : nullptr, made, PANEL);
            const float* more = bias ? bias + width + output : nullptr;
            multiply(many, from, channels, weight + (width + output) * channels, more, gate, PANEL);
            for (int64_t row = 0; row < many; ++row)
                for (int64_t at = row * PANEL; at < (row + 1) * PANEL; at += LANES) {
                    const vector by = load(gate + at);
                    store(result + (first + row) * width + output + at % PANEL, load(made + at) * by * normal(by));
                }
        }
}

}
