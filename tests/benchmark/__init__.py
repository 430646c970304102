"""What is measured: the timer, the tables, the figures, the tuner and its configs."""
