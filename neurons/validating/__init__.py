"""How a validator works: challenges ahead, rounds, what is written down of them, weights, and what it shows."""
