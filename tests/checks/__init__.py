"""What tests hold results against: properties of each stage, the promises, guarded memory."""
