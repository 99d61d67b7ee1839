"""The inner maximum of every sample."""
