// GEGLU: see geglu.py.

extern "C" void geglu(const float* values, float* result, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *linear = values + 2 * row * width, *gate = linear + width;
        for (int64_t at = 0; at < width; at += LANES)
            store(result + row * width + at, load(linear + at) * load(gate + at) * normal_cdf(load(gate + at)));
    }
}
