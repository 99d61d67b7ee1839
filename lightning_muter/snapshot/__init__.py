"""What is stored of a trained model, how it is taken, kept in files and taken anew."""
