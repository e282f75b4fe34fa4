"""Outliers: their sources, corruptions, those that were not distilled, start and range of distilled ones."""
