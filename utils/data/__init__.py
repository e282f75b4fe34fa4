"""Data: real images, their download, augmentation and whitening, the synthetic set and its file."""
