"""Training and testing networks on a synthetic set."""
