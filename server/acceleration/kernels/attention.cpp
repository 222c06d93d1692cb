// Attention with heads of 2 * PANEL channels: see attention.py.

// The channels of a query or a token are contiguous. Strides are from image to image and from query or token to the
// next.
extern "C" void attention(
    const float* queries, int64_t query_batch_stride, int64_t query_stride, const float* keys, int64_t key_batch_stride,
    int64_t key_stride, const float* values, int64_t value_batch_stride, int64_t value_stride, float* result,
    int64_t batch, int64_t heads, int64_t positions, int64_t tokens, int threads
) {
    constexpr int64_t HEAD_DIM = 2 * PANEL, QUERIES = 128;  // of one part, which packs keys and values for itself
    const int64_t parts = (positions + QUERIES - 1) / QUERIES, width = heads * HEAD_DIM;
    const int64_t padded = (tokens + PANEL - 1) / PANEL * PANEL;
    const float scale = 1 / std::sqrt(static_cast<float>(HEAD_DIM));
#pragma omp parallel for num_threads(threads) schedule(static) collapse(3)
    for (int64_t image = 0; image < batch; ++image)
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t first = part * QUERIES, count = std::min(QUERIES, positions - first);
                const int64_t begin = head * HEAD_DIM;
                float* scaled = scratch.reserve(QUERIES * HEAD_DIM + 2 * padded * HEAD_DIM + QUERIES * padded);
                float* key_panels = scaled + QUERIES * HEAD_DIM;
                float* value_panels = key_panels + padded * HEAD_DIM;
                float* weights = value_panels + padded * HEAD_DIM;
                for (int64_t query = 0; query < count; ++query) {
                    const float* source = queries + image * query_batch_stride + (first + query) * query_stride + begin;
                    for (int64_t channel = 0; channel < HEAD_DIM; channel += LANES)
                        store(scaled + query * HEAD_DIM + channel, scale * load(source + channel));
                }
                std::memset(key_panels, 0, 2 * padded * HEAD_DIM * sizeof(float));
                for (int64_t token = 0; token < tokens; ++token) {
                    const float* key = keys + image * key_batch_stride + token * key_stride + begin;
                    const float* value = values + image * value_batch_stride + token * value_stride + begin;
                    float* column = key_panels + token / PANEL * PANEL * HEAD_DIM + token % PANEL;
                    for (int64_t channel = 0; channel < HEAD_DIM; ++channel) column[channel * PANEL] = key[channel];
                    for (int64_t half = 0; half < 2; ++half)
                        std::memcpy(
                            value_panels + (half * padded + token) * PANEL, value + half * PANEL, PANEL * sizeof(float)
                        );
                }
                for (int64_t token = 0; token < padded; token += PANEL)
                    multiply(count, scaled, HEAD_DIM, key_panels + token * HEAD_DIM, nullptr, weights + token, padded);
                for (int64_t query = 0; query < count; ++query) {
                    float* row = weights + query * padded;
                    for (int64_t token = tokens; token < padded; ++token) row[token] = -INFINITY;
                    vector highest = load(row), sum = {};
                    for (int64_t token = LANES; token < padded; token += LANES) {
                        const vector scores = load(row + token);
                        highest = scores > highest ? scores : highest;
                    }
                    float maximum = highest[0], total = 0;
                    for (int64_t lane = 1; lane < LANES; ++lane) maximum = std::max(maximum, highest[lane]);
                    for (int64_t token = 0; token < padded; token += LANES) {
                        const vector weight = exponential(load(row + token) - maximum);
                        store(row + token, weight);
                        sum += weight;
                    }
                    for (int64_t lane = 0; lane < LANES; ++lane) total += sum[lane];
                    for (int64_t token = 0; token < padded; token += LANES)
                        store(row + token, load(row + token) * (1 / total));
                }
                float* target = result + (image * positions + first) * width + begin;
                for (int64_t half = 0; half < 2; ++half)
                    multiply(
                        count, weights, padded, value_panels + half * padded * PANEL, nullptr, target + half * PANEL,
                        width
                    );
            }
}
