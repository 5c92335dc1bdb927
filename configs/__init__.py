"""Configs of the command line: each file's config() is one experiment."""
