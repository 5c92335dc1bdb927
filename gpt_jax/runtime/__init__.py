"""The environment of a run: devices and mesh, other processes, the run's folder, git, and the terminal."""
