// The C++ kernels as one translation unit: they share inlined products and one scratch memory for each thread.
//
// Images are in the order (batch, height, width, channels), all values are fp32. Every value is computed by the same
// operations in the same order whatever its neighbours are and however many threads share the work: sums run over
// channels, or over the positions of a part of an image whose bounds are fixed.

#include "vectors.h"

#include "attention.cpp"
#include "geglu.cpp"
#include "linear.cpp"
#include "norms.cpp"
#include "winograd.cpp"
