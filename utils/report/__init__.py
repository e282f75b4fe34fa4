"""What people look at: tables, plots, the comparison of runs as text and as a page."""
