"""The methods that people compare with: one file each, config and trainer together."""
