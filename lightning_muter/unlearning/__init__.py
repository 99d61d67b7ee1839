"""One request: checked, carried out, measured, committed."""
