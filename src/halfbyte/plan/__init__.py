"""What this machine has and what a run will need."""
