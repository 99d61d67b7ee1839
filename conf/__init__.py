"""Configuration of the study, read by Hydra."""
