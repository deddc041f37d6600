"""Triton kernels of the ops, installed as `condense_core.kernels`; `condense_core.ops` is their public face.

A file is named after its op and holds that op's kernels, `forward` (or `backward`), which takes the op's record of
`condense_core.ops.arguments`, checks nothing, allocates the outputs and launches the kernels, and `unsupported`, which
says why they cannot take a call. `common.py` has what several of them share, `launch.py` is the only way to a launch,
and `aot.py` compiles every kernel without a GPU. Nothing is imported here: triton is loaded with the first kernel that
runs.
"""

if __name__ == "kernels":
    # The checkout stands on sys.path and this folder hides a library of the same name, which transformers looks for.
    # The name belongs to that library: load it from the rest of the path in this module's stead.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry or ".").resolve() != _checkout])
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError(
            "No module named 'kernels' (this project's kernels are condense_core.kernels)", name=__name__
        )
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
