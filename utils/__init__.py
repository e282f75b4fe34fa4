"""Everything that the scripts share; see the map of the code in README.md."""
