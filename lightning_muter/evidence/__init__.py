"""Evidence of forgetting, as pure functions on scores (numpy arrays): membership attacks and distances between laws of margins.

They need no model, no file and nothing else of this package: train and unlearn your own way, keep the margins of your samples in
every world, and call them (:mod:`~lightning_muter.evidence.observed` says what a world is).
"""
