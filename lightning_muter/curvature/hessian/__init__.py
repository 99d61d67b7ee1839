"""Hessians: their direct parts and sums."""
