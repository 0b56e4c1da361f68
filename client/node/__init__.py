"""A site's node: it keeps the connection to the coordinator, and answers in a warm process of its own."""
