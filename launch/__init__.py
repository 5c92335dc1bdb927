"""Runs on other machines: the description of a job, the hardware that it needs, and one module for each target."""
