"""Every run, round, metric and unit of privacy spent, in SQLite or PostgreSQL (see `store.History`)."""
