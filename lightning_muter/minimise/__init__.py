"""Towards the minimum of the robust objective: polish, refine, the last steps."""
