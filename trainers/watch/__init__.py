"""What a run tells of itself: seconds and memory of each phase, metrics, the result."""
