"""Trainings on other machines: `job` says what is to run, `accelerators` on what; one module for each target runs it there."""
