"""Configs for the command line. The function config() of each file returns the settings of one run."""
