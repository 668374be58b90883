"""From a cache to text: sampling, stopping, CUDA graphs, fused kernels."""
