"""Implementations of attention other than its plain definition."""
