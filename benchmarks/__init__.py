"""Benchmarks: speed only, ratios within one run."""
