"""The environment of a run: its device mesh, its processes, its folder, its git checkout, and the terminal."""
