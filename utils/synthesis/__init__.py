"""What the methods share in optimising images: the images, the treatment of outliers, trained networks, a student."""
