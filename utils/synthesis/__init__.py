"""What the methods share in optimising images: the images themselves, how outliers are treated, trained networks."""
