"""Miners that want to be paid without compressing, for tests and local subnets: ``kinds`` names them all.

Each answers at a port of its own and announces it as a miner does. `tests/neurons/adversaries.py` proves that they earn
nothing. ``python -m condense_core.neurons.local.adversaries KIND=HOTKEY ...`` runs some of them in one process.
"""
