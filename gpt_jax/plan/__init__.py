"""Compiling programs for hardware that is not attached, and reading their costs from the compiler's output."""
