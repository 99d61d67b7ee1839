"""Everything unsuitable about model, loss, data and optimiser, found before the work begins and told in one list."""
