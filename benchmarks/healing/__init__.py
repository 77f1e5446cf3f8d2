"""How much accuracy healing brings back, beside other methods. See `__main__`."""
