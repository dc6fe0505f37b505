"""The agent: everything with a run folder (collecting, training, driving), and the simulators."""
