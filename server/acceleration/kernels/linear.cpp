// Linear layers, also with a GEGLU after them: see linear.py. Weights are (outputs / PANEL, channels, PANEL).

namespace {

constexpr int64_t ROWS_AT_ONCE = 64;

}  // namespace

extern "C" void linear(
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

extern "C" void linear_geglu(
    const float* rows, const float* weight, const float* bias, float* result, int64_t count, int64_t channels,
    int64_t width, int threads
) {
    const int64_t panels = width / PANEL, parts = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t first = part * ROWS_AT_ONCE, of_part = std::min(ROWS_AT_ONCE, count - first);
            const int64_t output = panel * PANEL;
            const float* source = rows + first * channels;
            float linear[ROWS_AT_ONCE * PANEL], gate[ROWS_AT_ONCE * PANEL];
            const float* linear_bias = bias ? bias + output : nullptr;
            const float* gate_bias = bias ? bias + width + output : nullptr;
            multiply(of_part, source, channels, weight + output * channels, linear_bias, linear, PANEL);
            multiply(of_part, source, channels, weight + (width + output) * channels, gate_bias, gate, PANEL);
            for (int64_t row = 0; row < of_part; ++row)
                for (int64_t at = row * PANEL; at < (row + 1) * PANEL; at += LANES) {
                    const vector value = load(gate + at);
                    float* target = result + (first + row) * width + output + at % PANEL;
                    store(target, load(linear + at) * value * normal_cdf(value));
                }
        }
}
