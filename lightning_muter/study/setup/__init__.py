"""What a run of the study begins with."""
