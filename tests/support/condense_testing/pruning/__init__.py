"""Decoders, layers, oracles and cases that several tests of pruning share."""
