"""How maximisers move with the weights."""
