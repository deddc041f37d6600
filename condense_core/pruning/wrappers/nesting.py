"""Which wrappers may stand inside which."""

from __future__ import annotations

from collections.abc import Iterator

from condense_core.pruning.base import Method, Wrapper


def wrappers_of(method: Method) -> Iterator[Wrapper]:
    """The wrappers that ``method`` consists of, from the outside in; none for a method that scores by itself."""
    while isinstance(method, Wrapper):
        yield method
        method = method.method


def innermost(method: Method) -> Method:
    """``method`` without its wrappers."""
    while isinstance(method, Wrapper):
        method = method.method
    return method


def refuse_unbounded(wrapper: Wrapper) -> None:
    """``ValueError`` if the method inside keeps what it likes: there is no budget to divide."""
    if not wrapper.method.traits.bounded:
        raise ValueError(
            f"{type(wrapper).__name__}: method is {wrapper.method!r}, which keeps tokens without a budget; expected a "
            "method with one, such as SnapKV(keep=0.25)"
        )


def refuse_rotation(wrapper: Wrapper) -> None:
    """``ValueError`` if keys move inside a wrapper that lets heads or layers keep different numbers of tokens."""
    if wrapper.method.traits.rotates:
        name = type(wrapper).__name__
        raise ValueError(
            f"{name}: method is {wrapper.method!r}, which moves keys to positions that must be the same ones in every "
            f"head and layer, where {name} lets these keep different numbers of tokens; expected a method without "
            "Rerotate"
        )


def refuse_decoding(wrapper: Wrapper) -> None:
    """``ValueError`` if a cache is pruned during decoding inside a wrapper that makes it ragged."""
    if wrapper.method.traits.decodes:
        name = type(wrapper).__name__
        raise ValueError(
            f"{name}: method is {wrapper.method!r}, which shrinks the cache during decoding to one length in every "
            f"head, where {name} lets heads keep different numbers of tokens; expected a method without Decoding"
        )


def refuse_competition(wrapper: Wrapper) -> None:
    """``ValueError`` if the heads of all layers compete inside a wrapper that selects by scores of its own."""
    traits = wrapper.method.traits
    if traits.whole_model and traits.layers_differ:
        raise ValueError(
            f"{type(wrapper).__name__}: method is {wrapper.method!r}, whose heads compete across layers already; "
            "expected a method without AcrossLayers"
        )
