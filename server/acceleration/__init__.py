"""Make the networks fast: layers, kernels in Triton and C++, compilation. Nothing here is needed for a right image."""
