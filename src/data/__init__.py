"""Data: RLDS read in place, normalised and turned into what the policy sees, and back."""
