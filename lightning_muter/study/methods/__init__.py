"""Methods that are compared."""
