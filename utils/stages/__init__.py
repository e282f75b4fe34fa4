"""The three stages, from their flags to their runs; what the scripts at the top call."""
