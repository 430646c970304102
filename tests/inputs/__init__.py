"""What tests are given: named cases, rows of logits, generated decode steps, awkward
caches, a model that learnt to copy."""
