"""What is found out about a model once, by running it, and kept as long as the model lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

T = TypeVar("T")


def once_per_model(find: Callable[[PreTrainedModel], T]) -> Callable[[PreTrainedModel], T]:
    """``find`` with a memory: it runs at the first call with a model, and again only if the model has changed since.

    Changed means another dtype, device or attention function: a check made in float32 says little about bfloat16.
    Threads wait for each other, so that a model is not checked twice at the same time. An exception is kept like a
    result and raised again. Weights that are replaced in place are not noticed.
    """
    known: WeakKeyDictionary[PreTrainedModel, dict[Any, tuple[T | None, Exception | None]]] = WeakKeyDictionary()
    lock = RLock()

    @wraps(find)
    def found(model: PreTrainedModel) -> T:
        weight = next(model.parameters())
        # A session that is open in another thread shows as a prefix of the attention function's name.
        attention = str(getattr(model.config, "_attn_implementation", "")).rsplit("|", 1)[-1]
        key = (weight.dtype, weight.device, attention)
        with lock:
            results = known.setdefault(model, {})
            if key not in results:
                try:
                    results[key] = find(model), None
                except (TypeError, ValueError) as error:
                    results[key] = None, error.with_traceback(None)
            result, failure = results[key]
        if failure is not None:
            raise type(failure)(*failure.args)
        return result  # type: ignore[return-value]  # None only where `find` says so

    return found
