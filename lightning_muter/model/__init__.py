"""A user's module, loss, batches and rows, as they are read."""
