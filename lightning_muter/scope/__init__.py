"""What may change in a request: the head, or any parameters."""
