"""Running a training on other machines: a `Job`, the hardware it asks for, and one module for each target that can run it."""
