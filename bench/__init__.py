"""Speed: invariants that hold on any machine, and benchmarks that need a GPU to mean anything."""
