// 3 x 3 convolutions by F(4 x 4, 3 x 3): see winograd.py.

namespace {

constexpr int64_t TILES_AT_ONCE = 48;  // enough to read weights seldom, few enough for the cache
constexpr int64_t FEW_TILES = 24;  // for a thread: below, reading weights takes longer than transforming pixels

// Lavin and Gray's transforms of a line of 6 pixels, and of 6 products back to 4 pixels.
inline void transform(const vector d[6], vector t[6]) {
    const vector a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] - 5 * d[2] + d[4];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = 4 * d[1] - 5 * d[3] + d[5];
}

inline void transform_back(const vector m[6], vector y[4]) {
    const vector a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
    y[0] = m[0] + a + c;
    y[1] = b + 2 * e;
    y[2] = a + 4 * c;
    y[3] = b + 8 * e + m[5];
}

}  // namespace

// The weight is (36, outputs / PANEL, channels, PANEL).
extern "C" void winograd(
    const float* images, const float* weight, const float* bias, int64_t bias_stride, const float* residual,
    float* result, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs, int threads
) {
    const int64_t tiles_down = (height + 3) / 4, tiles_across = (width + 3) / 4;
    const int64_t tiles = batch * tiles_down * tiles_across, panels = outputs / PANEL;
    const int64_t shares = tiles < FEW_TILES * threads ? std::min<int64_t>(panels, threads) : 1;
    int64_t parts = (tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
    if (shares == 1) parts = (parts + threads - 1) / threads * threads;
    const int64_t max_count = (tiles + parts - 1) / parts;
    const int64_t pixel_stride = max_count * channels + 16;  // so that 36 of them are not in the same lines of a cache
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t share = 0; share < shares; ++share) {
            const int64_t first = tiles * part / parts, count = tiles * (part + 1) / parts - first;
            const int64_t begin = panels * share / shares, end = panels * (share + 1) / shares;
            const int64_t columns = (end - begin) * PANEL, product_stride = max_count * columns + 16;
            float* transformed = scratch.reserve(36 * (pixel_stride + product_stride) + channels);
            float* products = transformed + 36 * pixel_stride;
            float* zeros = products + 36 * product_stride;
            std::memset(zeros, 0, channels * sizeof(float));

            for (int64_t index = 0; index < count; ++index) {
                const int64_t tile = first + index, image = tile / (tiles_down * tiles_across);
                const int64_t top = tile / tiles_across % tiles_down * 4 - 1, left = tile % tiles_across * 4 - 1;
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
                        transform(d, t);
                        for (int y = 0; y < 6; ++y) half[y][x] = t[y];
                    }
                    float* target = transformed + index * channels + channel;
                    for (int y = 0; y < 6; ++y) {
                        vector t[6];
                        transform(half[y], t);
                        for (int x = 0; x < 6; ++x) store(target + (y * 6 + x) * pixel_stride, t[x]);
                    }
                }
            }

            for (int64_t matrix = 0; matrix < 36; ++matrix)
                for (int64_t panel = begin; panel < end; ++panel)
                    multiply(
                        count, transformed + matrix * pixel_stride, channels,
                        weight + (matrix * panels + panel) * channels * PANEL, nullptr,
                        products + matrix * product_stride + (panel - begin) * PANEL, columns
                    );

            for (int64_t index = 0; index < count; ++index) {
                const int64_t tile = first + index, image = tile / (tiles_down * tiles_across);
                const int64_t top = tile / tiles_across % tiles_down * 4, left = tile % tiles_across * 4;
                const int64_t lines = std::min<int64_t>(4, height - top), pixels = std::min<int64_t>(4, width - left);
                for (int64_t column = 0; column < columns; column += LANES) {
                    vector half[4][6];
                    const float* source = products + index * columns + column;
                    for (int x = 0; x < 6; ++x) {
                        vector m[6], y[4];
                        for (int line = 0; line < 6; ++line) m[line] = load(source + (line * 6 + x) * product_stride);
                        transform_back(m, y);
                        for (int line = 0; line < 4; ++line) half[line][x] = y[line];
                    }
                    const int64_t output = begin * PANEL + column;
                    const vector added = bias ? load(bias + image * bias_stride + output) : vector{};
                    for (int64_t line = 0; line < lines; ++line) {
                        vector y[4];
                        transform_back(half[line], y);
                        const int64_t target = ((image * height + top + line) * width + left) * outputs + output;
                        for (int64_t x = 0; x < pixels; ++x) {
                            const int64_t pixel = target + x * outputs;
                            const vector value = y[x] + added;
                            store(result + pixel, residual ? value + load(residual + pixel) : value);
                        }
                    }
                }
            }
        }
}
