"""What a run is to everybody: its options, its folder, what it tells."""
