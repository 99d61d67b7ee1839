"""Adversarial batches: reading an attack object, attacking the true loss, and the wrapped training step."""
