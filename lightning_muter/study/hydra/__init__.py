"""What the study adds to Hydra."""
