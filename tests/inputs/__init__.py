"""What tests are given: named cases, rows of logits, generated decode steps."""
