"""From a certified distance to weights that may be shown: noise, what it is worth over several releases, and what leaks without."""
