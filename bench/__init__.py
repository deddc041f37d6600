"""Benchmarks: what is measured, against which rivals, and the records of it. CONTRIBUTING.md says how to measure."""
