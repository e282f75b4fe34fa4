"""Outliers that are not distilled: their sources, and corruptions."""
