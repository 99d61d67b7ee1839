"""The robust objective: values, gradients, sums, products."""
