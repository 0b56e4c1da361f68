"""The only door for sites: TLS in front of a SuperLink on loopback, for nodes whose keys are enrolled."""
