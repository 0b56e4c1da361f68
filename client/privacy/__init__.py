"""What the privacy claim rests on: engine, probe, randomness, ledger, policy."""
