"""The kernels' generated code, run on the CPU against the reference: every stage at small sizes.

What only a GPU shows (races, asynchronous copies, wgmma, bf16) is left to the tests marked `gpu`.
"""
