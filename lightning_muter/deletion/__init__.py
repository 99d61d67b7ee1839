"""Deletion requests as transactions on checkpoints: ledger, receipts, all-or-nothing writes, and the commands that drive them."""
