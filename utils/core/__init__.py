"""Foundations: one-line errors, the argument parser, keyed random generators, versions."""
