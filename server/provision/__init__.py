"""A federation on paper turned into folders: certificates, keys, tokens and configuration, a kit for each party."""
