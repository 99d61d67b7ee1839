"""Data sets of the experiments, as LightningDataModules."""
