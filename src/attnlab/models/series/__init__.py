"""Networks that forecast series of several variables."""
