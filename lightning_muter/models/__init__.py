"""Models of the experiments, as LightningModules."""
