"""Measures the drift monitor on real features: false alarms, delays, peers, the centre's and the probe's cost."""
