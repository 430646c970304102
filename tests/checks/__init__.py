"""What tests hold results against: closeness to float64, properties of each stage, the
promises, guarded memory, what a step kept."""
