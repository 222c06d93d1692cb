// Group norm and layer norm: see norms.py.

namespace {

constexpr int64_t POSITIONS = 64;  // of a part of an image, which is read twice, the second time from the cache

// Compute the mean of each of WIDTH vectors of channels over the positions, and the sum of squared differences from it.
template <int WIDTH>
inline void moments(const float* source, int64_t count, int64_t channels, float* means) {
    vector sums[WIDTH] = {}, m2[WIDTH] = {};
    for (int64_t position = 0; position < count; ++position)
        for (int at = 0; at < WIDTH; ++at) sums[at] += load(source + position * channels + at * LANES);
    for (int at = 0; at < WIDTH; ++at) sums[at] /= static_cast<float>(count);
    for (int64_t position = 0; position < count; ++position)
        for (int at = 0; at < WIDTH; ++at) {
            const vector difference = load(source + position * channels + at * LANES) - sums[at];
            m2[at] += difference * difference;
        }
    for (int at = 0; at < WIDTH; ++at) {
        store(means + at * LANES, sums[at]);
        store(means + channels + at * LANES, m2[at]);
    }
}

}  // namespace

extern "C" void group_norm(
    const float* images, const float* shift, int64_t shift_stride, const float* weight, const float* bias,
    float* result, int64_t batch, int64_t positions, int64_t channels, int64_t groups, float eps, int with_silu,
    int threads
) {
    const int64_t parts = (positions + POSITIONS - 1) / POSITIONS, per_group = channels / groups;
    float* const all_moments = scratch.reserve(2 * batch * (parts + 1) * channels);
    float* const affine = all_moments + 2 * batch * parts * channels;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t index = 0; index < batch * parts; ++index) {
            const int64_t first = index % parts * POSITIONS, count = std::min(POSITIONS, positions - first);
            const float* source = images + (index / parts * positions + first) * channels;
            float* means = all_moments + 2 * index * channels;
            int64_t channel = 0;
            for (; channel + 4 * LANES <= channels; channel += 4 * LANES)
                moments<4>(source + channel, count, channels, means + channel);
            for (; channel < channels; channel += LANES) moments<1>(source + channel, count, channels, means + channel);
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < batch * groups; ++index) {
            const int64_t image = index / groups, begin = index % groups * per_group;
            const float* means = all_moments + 2 * image * parts * channels;
            const float* shifts = shift ? shift + image * shift_stride : nullptr;
            double mean = 0, m2 = 0;
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t channel = begin; channel < begin + per_group; ++channel) {
                    const double of_part = means[2 * part * channels + channel] + (shifts ? shifts[channel] : 0.0);
                    mean += of_part * std::min(POSITIONS, positions - part * POSITIONS);
                }
            mean /= positions * per_group;
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t channel = begin; channel < begin + per_group; ++channel) {
                    const float* of_channel = means + 2 * part * channels + channel;
                    const double difference = of_channel[0] + (shifts ? shifts[channel] : 0.0) - mean;
                    const int64_t count = std::min(POSITIONS, positions - part * POSITIONS);
                    m2 += of_channel[channels] + difference * difference * count;
                }
            const double rstd = 1 / std::sqrt(m2 / (positions * per_group) + eps);
            for (int64_t channel = begin; channel < begin + per_group; ++channel) {
                const double factor = rstd * weight[channel];
                affine[2 * image * channels + channel] = factor;
                affine[(2 * image + 1) * channels + channel] =
                    bias[channel] + ((shifts ? shifts[channel] : 0.0) - mean) * factor;
            }
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < batch * parts; ++index) {
            const int64_t image = index / parts, first = index % parts * POSITIONS;
            const int64_t count = std::min(POSITIONS, positions - first);
            const int64_t begin = (image * positions + first) * channels;
            const float *factors = affine + 2 * image * channels, *addends = factors + channels;
            for (int64_t at = begin; at < begin + count * channels; at += channels)
                for (int64_t channel = 0; channel < channels; channel += LANES) {
                    const vector value = load(images + at + channel);
                    const vector normed = value * load(factors + channel) + load(addends + channel);
                    store(result + at + channel, with_silu ? silu(normed) : normed);
                }
        }
    }
}

extern "C" void layer_norm(
    const float* values, const float* residual, const float* weight, const float* bias, float* total, float* result,
    int64_t rows, int64_t width, float eps, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t begin = row * width;
        const float* source = values + begin;
        vector sum = {}, m2s = {};
        for (int64_t at = 0; at < width; at += LANES) {
            vector value = load(source + at);
            if (residual) store(total + begin + at, value += load(residual + begin + at));
            sum += value;
        }
        if (residual) source = total + begin;
        float mean = 0, m2 = 0;
        for (int64_t lane = 0; lane < LANES; ++lane) mean += sum[lane];
        mean /= width;
        for (int64_t at = 0; at < width; at += LANES) {
            const vector difference = load(source + at) - mean;
            m2s += difference * difference;
        }
        for (int64_t lane = 0; lane < LANES; ++lane) m2 += m2s[lane];
        const float rstd = 1 / std::sqrt(m2 / width + eps);
        for (int64_t at = 0; at < width; at += LANES)
            store(result + begin + at, (load(source + at) - mean) * rstd * load(weight + at) + load(bias + at));
    }
}
