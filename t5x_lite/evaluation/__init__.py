"""Metrics on model outputs."""
