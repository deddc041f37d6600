"""Results of earlier requests, as many as fit into a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from condense_core.compressor.soft_tokens import SoftTokens


class ResultCache:
    """Soft tokens by the digest of what was asked; those not used for longest go first. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        """An empty cache of at most ``max_bytes`` of embeddings and kept text; 0: nothing is kept."""
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, SoftTokens] = OrderedDict()
        self._lock = Lock()
        self.nbytes = 0

    def get(self, digest: bytes) -> SoftTokens | None:
        """What was kept for ``digest``."""
        with self._lock:
            if (found := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
            return found

    def put(self, digest: bytes, soft: SoftTokens) -> None:
        """Keep ``soft``, and drop others where that is too much."""
        size = _size(soft)
        if size > self.max_bytes:
            return
        with self._lock:
            if (former := self._kept.pop(digest, None)) is not None:
                self.nbytes -= _size(former)
            self._kept[digest] = soft
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                self.nbytes -= _size(self._kept.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._kept)


def _size(soft: SoftTokens) -> int:
    return soft.nbytes + len(soft.text.encode()) + 1024  # and what Python needs around them
