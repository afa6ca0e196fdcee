"""What tests stand on: real ranks, oracles, problems and tables of rules; a driver, a backend and Triton versions."""
