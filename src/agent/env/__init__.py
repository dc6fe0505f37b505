"""Simulators behind a process boundary. Nothing here imports torch."""
