"""Test doubles: what stands where a GPU, a kernel, a tuner's bench or a benchmark would."""
