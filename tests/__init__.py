"""Tests of the kernels, the reference, the benchmark's results and the layering."""
