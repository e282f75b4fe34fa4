"""What stage 2 trains on: distilled images, or the baselines beside them; and outliers, distilled or not."""
