"""What an engineer and a privacy officer ask of a run's privacy: what it will cost, and what it guaranteed."""
