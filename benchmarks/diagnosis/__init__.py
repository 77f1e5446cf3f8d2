"""How often a drift is given its right name: `python -m benchmarks.diagnosis`."""
