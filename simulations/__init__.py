"""Federations on one machine: virtual sites, scenarios, and the in-process Grid."""
