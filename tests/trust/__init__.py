"""The long runs: generated cases, sanitizer, soak and planted faults, and what they have found."""
