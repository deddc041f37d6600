"""The CPU backend: functions that allocate results and hand tensors to the compiled kernels of `csrc/cpu`.

One module per file of public functions in `condense_core.ops`, one function per op, its arguments in the order of the
op's schema, already checked.
"""
