"""The flags of the scripts, in groups, their checks, and writing them back as a command line."""
