"""The machine that a run happens on: devices and mesh, other processes, the run's folder, git, the terminal."""
