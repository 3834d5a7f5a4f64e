"""What a run is for: to be served."""
