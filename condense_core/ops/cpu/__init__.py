"""The CPU backend: functions that allocate results and hand tensors to the compiled kernels of `csrc/cpu`.

One module per op, as in `csrc/cpu/kernels`; its function takes the op's record of `condense_core.ops.arguments`.
"""
