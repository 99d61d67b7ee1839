"""The comparison with retraining: worlds to train in, methods that answer requests, what is measured, and its tables and plots."""
