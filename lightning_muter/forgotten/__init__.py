"""Rows that were forgotten: how they are known again, and who remembers them. Plain torch."""
