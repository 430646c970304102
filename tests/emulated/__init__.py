"""The kernels' generated CUDA, run on the CPU."""
