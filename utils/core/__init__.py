"""Foundations: errors in one line, keyed random generators, how a script runs, files and images read safely."""
