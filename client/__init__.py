"""The site: its data, its training, and the privacy of what it releases."""
