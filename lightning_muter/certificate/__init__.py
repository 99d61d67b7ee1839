"""How far from the retrained optimum: a bound for linear models."""
