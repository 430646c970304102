"""Tests of the kernels, a file a stage, and of the package as a whole; `emulated` runs the kernels'
code on the CPU. Rooms of their own have the tests of the `reference`, of `models` with the adapter
and the evaluation, and of the `benchmark` with its tuner and figures.
"""
