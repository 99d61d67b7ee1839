"""Files: atomic, sealed, without code."""
