"""The text-to-image service: gRPC in, the Stable Diffusion XL ensemble of experts on one device, images out."""
