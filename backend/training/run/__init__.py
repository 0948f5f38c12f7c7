"""What a run is and how it survives: state, checkpoints, resume, signals, record."""
