"""KV-cache pruning: read a context once, keep the keys and values that matter, drop the rest for real.

``with prune(model, SnapKV(keep=0.25)): model.generate(**inputs)`` prunes whatever runs inside;
``PrunedCache.prefill(model, ids, SnapKV(keep=0.25))`` makes a cache to keep, to save and to ask.
"""
