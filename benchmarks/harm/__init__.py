"""Does healing ever make it worse? `python -m benchmarks.harm`."""
