"""What tests stand on: a driver, a backend and Triton versions, for machines without a GPU."""
