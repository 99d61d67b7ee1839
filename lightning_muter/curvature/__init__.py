"""Statistics of the total Hessian. Plain torch: no Lightning, no Hydra below this line."""
