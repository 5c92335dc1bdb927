"""Compiles for hardware that is not attached, and reads what its compiler says about a program."""
