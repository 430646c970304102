"""Models with the adapter: what they decode, launch and record, how the evaluation scores it."""
