"""Estimates of the memory that training takes."""
