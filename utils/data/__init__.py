"""Data: real images, augmentation, corruptions, sources of outliers, and the synthetic set."""
