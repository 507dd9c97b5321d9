"""Runnable studies of why and how training works."""
