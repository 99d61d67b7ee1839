"""Ways to solve H delta = g, each with a status."""
